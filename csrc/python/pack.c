/* pack, unpack, layout. */
#include "boundary.h"

static int parse_levels(PyObject *value, int32_t *levels) {
    int64_t number = 0;
    if (bw_arg_int("levels", value, 0, 256, &number)) return -1;
    bw_scheme scheme = {(int32_t)number, 1, -1};
    *levels = (int32_t)number;
    if (!bw_check_scheme(&scheme)) return 0;
    PyErr_Format(PyExc_ValueError, "levels: expected 2, 3, 4, 8, 16, 32, 64 or 256; got %R", value);
    return -1;
}

static PyObject *new_bytes(const char *operation, int64_t rows, int64_t cols, uint8_t **data) {
    npy_intp shape[2] = {(npy_intp)rows, (npy_intp)cols};
    int64_t size;
    if (__builtin_mul_overflow(rows, cols, &size) || size > PTRDIFF_MAX)
        return bw_raise(operation, "codes", BW_ERR_OVERFLOW);
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_UINT8);
    if (array) *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

const char bw_doc_pack[] = "pack(codes, levels)\n--\n\n"
                           "Pack uint8 codes (rows, cols), one a byte, into rows of bits (rows, row_bytes).";

PyObject *bw_py_pack(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"codes", "levels", NULL};
    PyObject *v[2], *result = NULL;
    bw_view codes = {0};
    bw_layout layout;
    int32_t levels;
    uint8_t *data = NULL;
    if (bw_parse("pack", names, args, n_args, keywords, v) || parse_levels(v[1], &levels) ||
        bw_view_acquire("codes", v[0], BW_CONTIGUOUS, &codes) || bw_view_expect_dtype("codes", &codes, "uint8") ||
        bw_view_expect_ndim("codes", &codes, 2))
        goto done;
    const bw_scheme scheme = {levels, 1, -1};
    bw_status status = bw_scheme_layout(&scheme, (ptrdiff_t)codes.shape[0], (ptrdiff_t)codes.shape[1], &layout);
    if (status) {
        bw_raise("pack", "codes", status);
        goto done;
    }
    result = new_bytes("pack", codes.shape[0], layout.row_bytes, &data);
    if (!result) goto done;
    bw_release_gil();
    status = bw_pack((uint8_t *)codes.data, (ptrdiff_t)codes.shape[0], (ptrdiff_t)codes.shape[1], levels, data);
    bw_take_gil();
    if (status) {
        Py_CLEAR(result);
        bw_raise("pack", "codes", status);
    }
done:
    bw_view_release(&codes);
    return result;
}

const char bw_doc_unpack[] = "unpack(packed, cols, levels)\n--\n\n"
                             "Unpack rows of bits into uint8 codes (rows, cols), one a byte.";

PyObject *bw_py_unpack(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"packed", "cols", "levels", NULL};
    PyObject *v[3], *result = NULL;
    bw_view packed = {0};
    bw_layout layout;
    int32_t levels;
    int64_t cols = 0;
    uint8_t *data = NULL;
    if (bw_parse("unpack", names, args, n_args, keywords, v) || parse_levels(v[2], &levels) ||
        bw_arg_int("cols", v[1], 0, PTRDIFF_MAX, &cols) || bw_view_acquire("packed", v[0], BW_CONTIGUOUS, &packed) ||
        bw_view_expect_dtype("packed", &packed, "uint8") || bw_view_expect_ndim("packed", &packed, 2))
        goto done;
    const bw_scheme scheme = {levels, 1, -1};
    bw_status status = bw_scheme_layout(&scheme, (ptrdiff_t)packed.shape[0], (ptrdiff_t)cols, &layout);
    if (status) {
        bw_raise("unpack", "packed, cols", status);
        goto done;
    }
    const int64_t shape[2] = {packed.shape[0], layout.row_bytes};
    if (bw_view_expect_shape("packed", &packed, 2, shape)) goto done;
    result = new_bytes("unpack", packed.shape[0], cols, &data);
    if (!result) goto done;
    bw_release_gil();
    status = bw_unpack((uint8_t *)packed.data, (ptrdiff_t)packed.shape[0], (ptrdiff_t)cols, levels, data);
    bw_take_gil();
    if (status) {
        Py_CLEAR(result);
        bw_raise("unpack", "packed", status);
    }
done:
    bw_view_release(&packed);
    return result;
}

const char bw_doc_layout[] = "layout(scheme, rows, cols)\n--\n\n"
                             "Exact sizes of a stored matrix: {row_bytes, n_groups, row_zero_bytes, n_bytes}, bytes.";

PyObject *bw_py_layout(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"scheme", "rows", "cols", NULL};
    PyObject *v[3];
    bw_scheme scheme;
    bw_layout l;
    int64_t rows = 0, cols = 0;
    if (bw_parse("layout", names, args, n_args, keywords, v) || bw_arg_scheme("scheme", v[0], &scheme) ||
        bw_arg_int("rows", v[1], 0, PTRDIFF_MAX, &rows) || bw_arg_int("cols", v[2], 0, PTRDIFF_MAX, &cols))
        return NULL;
    bw_status status = bw_scheme_layout(&scheme, (ptrdiff_t)rows, (ptrdiff_t)cols, &l);
    if (status) return bw_raise("layout", "rows, cols", status);
    return Py_BuildValue("{s:n,s:n,s:n,s:n}", "row_bytes", l.row_bytes, "n_groups", l.n_groups, "row_zero_bytes",
                         l.row_zero_bytes, "n_bytes", l.n_bytes);
}
