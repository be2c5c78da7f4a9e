/* quantize_rtn, encode, dequantize. */
#include "boundary.h"

const char bw_doc_quantize_rtn[] = "quantize_rtn(weight, scheme)\n--\n\n"
                                   "Round a (rows, cols) float matrix to nearest on each group's range.\n\n"
                                   "scheme is (levels, group_size, symmetric). Returns (codes, scales, zeros or None).";

PyObject *bw_py_quantize_rtn(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight", "scheme", NULL};
    PyObject *v[2], *result = NULL;
    bw_view weight = {0};
    bw_matrix matrix;
    bw_scheme scheme;
    bw_quantized out;
    bw_status status = BW_OK;
    if (bw_parse("quantize_rtn", names, args, n_args, keywords, v) || bw_arg_scheme("scheme", v[1], &scheme) ||
        bw_view_float_matrix("weight", v[0], &weight, &matrix))
        goto done;
    result = bw_stored_new(matrix.rows, matrix.cols, &scheme, &out);
    if (!result) goto done;
    bw_release_gil();
    status = bw_quantize_rtn(&matrix, &out);
    bw_take_gil();
    if (status) {
        Py_CLEAR(result);
        bw_raise("quantize_rtn", "weight", status);
    }
done:
    bw_view_release(&weight);
    return result;
}

const char bw_doc_encode[] = "encode(weight, scales, zeros, scheme)\n--\n\n"
                             "Packed codes (rows, row_bytes) of a float matrix on scales and zeros that are given.";

PyObject *bw_py_encode(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight", "scales", "zeros", "scheme", NULL};
    PyObject *v[4], *codes = NULL, *cols = NULL;
    bw_view weight = {0};
    bw_stored stored = {0};
    bw_matrix matrix;
    bw_layout layout;
    bw_scheme scheme;
    bw_status status;
    if (bw_parse("encode", names, args, n_args, keywords, v) || bw_arg_scheme("scheme", v[3], &scheme) ||
        bw_view_float_matrix("weight", v[0], &weight, &matrix))
        goto done;
    status = bw_scheme_layout(&scheme, matrix.rows, matrix.cols, &layout);
    if (status) {
        bw_raise("encode", "weight", status);
        goto done;
    }
    npy_intp shape[2] = {matrix.rows, layout.row_bytes};
    codes = PyArray_SimpleNew(2, shape, NPY_UINT8);
    cols = PyLong_FromSsize_t(matrix.cols);
    if (!codes || !cols || bw_stored_acquire(codes, v[1], v[2] == Py_None ? NULL : v[2], v[3], cols, &stored)) {
        Py_CLEAR(codes);
        goto done;
    }
    bw_release_gil();
    status = bw_encode(&matrix, &stored.tensor);
    bw_take_gil();
    if (status) {
        Py_CLEAR(codes);
        bw_raise("encode", status == BW_ERR_CODE ? "zeros" : "weight", status);
    }
done:
    Py_XDECREF(cols);
    bw_stored_release(&stored);
    bw_view_release(&weight);
    return codes;
}

const char bw_doc_dequantize[] =
    "dequantize(codes, scales, zeros, scheme, cols, out, rows=None)\n--\n\n"
    "Write (q - zero) * scale into `out`, a contiguous (rows, cols) float32, float16 or bfloat16 tensor.\n\n"
    "rows: int64 (n,), only these rows, in this order; out is then (n, cols).";

PyObject *bw_py_dequantize(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"codes", "scales", "zeros", "scheme", "cols", "out", "|", "rows", NULL};
    PyObject *v[7], *result = NULL;
    bw_view out = {0}, rows = {0};
    bw_stored stored = {0};
    bw_matrix matrix;
    bw_status status;
    if (bw_parse("dequantize", names, args, n_args, keywords, v) ||
        bw_stored_acquire(v[0], v[1], v[2] == Py_None ? NULL : v[2], v[3], v[4], &stored) ||
        bw_view_acquire("out", v[5], BW_WRITABLE | BW_CONTIGUOUS, &out) || bw_view_matrix("out", &out, &matrix))
        goto done;
    if (v[6] && (bw_view_acquire("rows", v[6], BW_CONTIGUOUS, &rows) || bw_view_expect_dtype("rows", &rows, "int64") ||
                 bw_view_expect_ndim("rows", &rows, 1)))
        goto done;
    const int64_t shape[2] = {v[6] ? rows.shape[0] : stored.tensor.rows, stored.tensor.cols};
    if (bw_view_expect_shape("out", &out, 2, shape) || bw_stored_expect_apart("out", &out, &stored) ||
        (v[6] && bw_view_expect_apart("out", &out, "rows", &rows)))
        goto done;
    bw_release_gil();
    status = v[6] ? bw_dequantize_rows(&stored.tensor, (const int64_t *)rows.data, (ptrdiff_t)shape[0], matrix.dtype,
                                       out.data)
                  : bw_dequantize(&stored.tensor, matrix.dtype, out.data);
    bw_take_gil();
    if (status) bw_raise("dequantize", status == BW_ERR_INDEX ? "rows" : "codes", status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&rows);
    bw_view_release(&out);
    bw_stored_release(&stored);
    return result;
}
