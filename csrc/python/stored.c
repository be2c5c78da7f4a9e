/* Stored matrices in and out: codes, scales and zeros checked against their scheme. */
#include "boundary.h"

int bw_stored_acquire(PyObject *codes, PyObject *scales, PyObject *zeros, PyObject *scheme, PyObject *cols,
                      bw_stored *s) {
    int64_t n_cols = 0;
    if (bw_arg_scheme("scheme", scheme, &s->tensor.scheme) || bw_arg_int("cols", cols, 0, PTRDIFF_MAX, &n_cols) ||
        bw_view_acquire("codes", codes, BW_CONTIGUOUS, &s->codes) ||
        bw_view_expect_dtype("codes", &s->codes, "uint8") || bw_view_expect_ndim("codes", &s->codes, 2))
        return -1;
    int64_t rows = s->codes.shape[0];
    bw_status status = bw_scheme_layout(&s->tensor.scheme, (ptrdiff_t)rows, (ptrdiff_t)n_cols, &s->layout);
    if (status) {
        bw_raise("a stored matrix", "codes, cols", status);
        return -1;
    }
    const int64_t code_shape[2] = {rows, s->layout.row_bytes}, scale_shape[2] = {rows, s->layout.n_groups},
                  zero_shape[2] = {rows, s->layout.row_zero_bytes};
    if (bw_view_expect_shape("codes", &s->codes, 2, code_shape) ||
        bw_view_array("scales", scales, "float16", 2, scale_shape, 0, &s->scales))
        return -1;
    if (!s->tensor.scheme.symmetric) {
        if (!zeros) {
            PyErr_SetString(PyExc_ValueError, "zeros: expected an array, since the scheme is asymmetric; got None");
            return -1;
        }
        if (bw_view_array("zeros", zeros, "uint8", 2, zero_shape, 0, &s->zeros)) return -1;
    } else if (zeros) {
        PyErr_SetString(PyExc_ValueError, "zeros: expected None, since the scheme is symmetric; got an array");
        return -1;
    }
    s->tensor.codes = (uint8_t *)s->codes.data;
    s->tensor.scales = (uint16_t *)s->scales.data;
    s->tensor.zeros = (uint8_t *)s->zeros.data;
    s->tensor.rows = (ptrdiff_t)rows;
    s->tensor.cols = (ptrdiff_t)n_cols;
    return 0;
}

void bw_stored_release(bw_stored *s) {
    bw_view_release(&s->codes);
    bw_view_release(&s->scales);
    bw_view_release(&s->zeros);
}

int bw_stored_expect_apart(const char *name, const bw_view *out, const bw_stored *s) {
    if (bw_view_expect_apart(name, out, "codes", &s->codes) || bw_view_expect_apart(name, out, "scales", &s->scales))
        return -1;
    return s->zeros.data ? bw_view_expect_apart(name, out, "zeros", &s->zeros) : 0;
}

static PyObject *new_array(ptrdiff_t rows, ptrdiff_t cols, int type, void **data) {
    npy_intp shape[2] = {rows, cols};
    PyObject *array = PyArray_SimpleNew(2, shape, type);
    if (array) *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

PyObject *bw_stored_new(ptrdiff_t rows, ptrdiff_t cols, const bw_scheme *scheme, bw_quantized *tensor) {
    bw_layout l;
    bw_status status = bw_scheme_layout(scheme, rows, cols, &l);
    if (status) return bw_raise("a stored matrix", "scheme", status);
    void *code_data = NULL, *scale_data = NULL, *zero_data = NULL;
    PyObject *codes = new_array(rows, l.row_bytes, NPY_UINT8, &code_data);
    PyObject *scales = new_array(rows, l.n_groups, NPY_FLOAT16, &scale_data);
    PyObject *zeros = scheme->symmetric ? Py_NewRef(Py_None) : new_array(rows, l.row_zero_bytes, NPY_UINT8, &zero_data);
    PyObject *tuple = codes && scales && zeros ? PyTuple_Pack(3, codes, scales, zeros) : NULL;
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(zeros);
    *tensor = (bw_quantized){code_data, scale_data, zero_data, rows, cols, *scheme};
    return tuple;
}
