/* quantize_trellis, trellis_rates, dequantize_trellis, matmul_trellis. */
#include "boundary.h"

void bw_trellis_release(bw_trellis_views *t) {
    bw_view_release(&t->codes);
    bw_view_release(&t->scales);
    bw_view_release(&t->rates);
}

int bw_trellis_acquire(PyObject *const *v, bw_trellis_views *t) {
    int64_t width = 0, cols = 0;
    if (bw_arg_int("width", v[3], 10, 16, &width) || bw_arg_int("cols", v[4], 0, PTRDIFF_MAX, &cols) ||
        bw_view_acquire("scales", v[1], BW_CONTIGUOUS, &t->scales) ||
        bw_view_expect_dtype("scales", &t->scales, "float16") || bw_view_expect_ndim("scales", &t->scales, 1))
        return -1;
    const int64_t rate_shape[1] = {cols / 16 + (cols % 16 != 0)};
    if (bw_view_array("rates", v[2], "uint8", 1, rate_shape, 0, &t->rates)) return -1;
    t->tensor = (bw_trellis){.scales = (uint16_t *)t->scales.data,
                             .rates = (uint8_t *)t->rates.data,
                             .rows = (ptrdiff_t)t->scales.shape[0],
                             .cols = (ptrdiff_t)cols,
                             .width = (int32_t)width};
    bw_status status = bw_trellis_sizes(t->tensor.rates, t->tensor.rows, t->tensor.cols, t->tensor.width, &t->layout);
    if (status) {
        bw_raise("a trellis matrix", "rates", status);
        return -1;
    }
    const int64_t shape[2] = {t->layout.row_tiles, t->layout.row_bytes};
    if (bw_view_array("codes", v[0], "uint8", 2, shape, 0, &t->codes)) return -1;
    t->tensor.codes = (uint8_t *)t->codes.data;
    return 0;
}

static int expect_apart(const bw_view *out, const bw_trellis_views *t) {
    return bw_view_expect_apart("out", out, "codes", &t->codes) ||
           bw_view_expect_apart("out", out, "scales", &t->scales) ||
           bw_view_expect_apart("out", out, "rates", &t->rates);
}

/* Twice the bits a weight, in whole halves. */
static int half_bits_of(PyObject *object, int32_t *half_bits) {
    double bits = 0;
    if (bw_arg_float("bits", object, 1, 5, &bits)) return -1;
    *half_bits = (int32_t)(2 * bits);
    if ((double)*half_bits == 2 * bits) return 0;
    PyErr_Format(PyExc_ValueError, "bits: expected a multiple of 0.5; got %R", object);
    return -1;
}

const char bw_doc_quantize_trellis[] =
    "quantize_trellis(weight, hessian, bits, width=12, importance=None, damping=0.01, by_activation=True, refit=True, "
    "thorough=False, turned=False)"
    "\n--\n\nTrellis codes of a (rows, cols) float matrix; bits 1 .. 5 in halves; hessian float32 (cols, cols) or "
    "None,\n"
    "then errors count by importance, float32 (cols,) or None.\n\n"
    "Returns ((codes, scales, rates), row_errors float64 (rows,), damping used, dead columns).";

PyObject *bw_py_quantize_trellis(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight",  "hessian",       "bits",  "|",        "width",  "importance",
                                        "damping", "by_activation", "refit", "thorough", "turned", NULL};
    PyObject *v[10], *codes = NULL, *scales = NULL, *rates = NULL, *errors = NULL, *result = NULL;
    bw_view weight = {0}, hessian = {0}, importance = {0};
    bw_matrix matrix;
    double damping = 0.01;
    int64_t width = 12;
    int32_t half_bits = 0;
    int by_activation = 1, refit = 1, thorough = 0, turned = 0;
    bw_status status;
    if (bw_parse("quantize_trellis", names, args, n_args, keywords, v) || half_bits_of(v[2], &half_bits) ||
        bw_arg_int("width", v[3], 10, 16, &width) || bw_arg_float("damping", v[5], 0, 1000, &damping) ||
        bw_arg_flag("by_activation", v[6], &by_activation) || bw_arg_flag("refit", v[7], &refit) ||
        bw_arg_flag("thorough", v[8], &thorough) || bw_arg_flag("turned", v[9], &turned) ||
        bw_view_float_matrix("weight", v[0], &weight, &matrix))
        goto done;
    const bw_trellis_options options = {damping, half_bits, by_activation, refit, thorough, turned};
    const int64_t square[2] = {matrix.cols, matrix.cols};
    if ((v[1] != Py_None && bw_view_array("hessian", v[1], "float32", 2, square, 0, &hessian)) ||
        (v[4] && bw_view_array("importance", v[4], "float32", 1, square, 0, &importance)))
        goto done;
    npy_intp rows = matrix.rows, tiles = matrix.cols / 16 + (matrix.cols % 16 != 0),
             shape[2] = {rows / 16 + (rows % 16 != 0), bw_trellis_row_bytes(matrix.cols, options.half_bits)};
    codes = PyArray_SimpleNew(2, shape, NPY_UINT8);
    scales = PyArray_SimpleNew(1, &rows, NPY_FLOAT16);
    rates = PyArray_SimpleNew(1, &tiles, NPY_UINT8);
    errors = PyArray_ZEROS(1, &rows, NPY_FLOAT64, 0);
    if (!codes || !scales || !rates || !errors) goto done;
    const bw_trellis out = {PyArray_DATA((PyArrayObject *)codes),
                            PyArray_DATA((PyArrayObject *)scales),
                            PyArray_DATA((PyArrayObject *)rates),
                            matrix.rows,
                            matrix.cols,
                            (int32_t)width,
                            turned};
    bw_gptq_report report = {.row_errors = PyArray_DATA((PyArrayObject *)errors)};
    bw_release_gil();
    status = bw_trellis_quantize(&matrix, v[1] != Py_None ? (const float *)hessian.data : NULL,
                                 v[4] ? (const float *)importance.data : NULL, &options, &out, &report);
    bw_take_gil();
    int about_hessian = status == BW_ERR_HESSIAN || status == BW_ERR_FACTOR;
    if (status) bw_raise("quantize_trellis", about_hessian ? "hessian" : "weight", status);
    else result = Py_BuildValue("((OOO)OdL)", codes, scales, rates, errors, report.damping, (long long)report.n_dead);
done:
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(rates);
    Py_XDECREF(errors);
    bw_view_release(&importance);
    bw_view_release(&hessian);
    bw_view_release(&weight);
    return result;
}

const char bw_doc_trellis_rates[] = "trellis_rates(importance, bits, turned=False)\n--\n\nBits of each 16 columns, "
                                    "uint8 (n,), as quantize_trellis shares "
                                    "them out by what an error\n"
                                    "costs in them: importance, float64 (n,), contiguous, at least 0.";

PyObject *bw_py_trellis_rates(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"importance", "bits", "|", "turned", NULL};
    PyObject *v[3], *rates = NULL, *result = NULL;
    bw_view importance = {0};
    int32_t half_bits = 0;
    int turned = 0;
    if (bw_parse("trellis_rates", names, args, n_args, keywords, v) || half_bits_of(v[1], &half_bits) ||
        bw_arg_flag("turned", v[2], &turned) || bw_view_acquire("importance", v[0], BW_CONTIGUOUS, &importance) ||
        bw_view_expect_dtype("importance", &importance, "float64") ||
        bw_view_expect_ndim("importance", &importance, 1) ||
        bw_expect_range("importance", (Py_ssize_t)importance.shape[0], 1, PY_SSIZE_T_MAX))
        goto done;
    npy_intp n = (npy_intp)importance.shape[0];
    rates = PyArray_SimpleNew(1, &n, NPY_UINT8);
    if (!rates) goto done;
    uint8_t *out = PyArray_DATA((PyArrayObject *)rates);
    bw_release_gil();
    bw_status status = bw_trellis_rates((const double *)(const void *)importance.data, n, half_bits, turned, out);
    bw_take_gil();
    if (status) bw_raise("trellis_rates", "importance", status);
    else result = Py_NewRef(rates);
done:
    Py_XDECREF(rates);
    bw_view_release(&importance);
    return result;
}

const char bw_doc_dequantize_trellis[] =
    "dequantize_trellis(codes, scales, rates, width, cols, out, first=0, turned=False)\n--\n\n"
    "Write rows first .. first + n - 1 of a trellis matrix as numbers into `out`, contiguous (n, cols).";

PyObject *bw_py_dequantize_trellis(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"codes", "scales", "rates", "width",  "cols",
                                        "out",   "|",      "first", "turned", NULL};
    PyObject *v[8], *result = NULL;
    bw_trellis_views t = {0};
    bw_view out = {0};
    bw_matrix matrix;
    int64_t first = 0;
    int turned = 0;
    bw_status status;
    if (bw_parse("dequantize_trellis", names, args, n_args, keywords, v) ||
        bw_arg_int("first", v[6], 0, PTRDIFF_MAX, &first) || bw_arg_flag("turned", v[7], &turned) ||
        bw_trellis_acquire(v, &t) || bw_view_acquire("out", v[5], BW_WRITABLE | BW_CONTIGUOUS, &out) ||
        bw_view_matrix("out", &out, &matrix))
        goto done;
    /* Without `first` all rows are meant; with it as many as `out` has, or at most all that follow. */
    int64_t left = first < t.tensor.rows ? t.tensor.rows - first : 0;
    const int64_t shape[2] = {v[6] && matrix.rows < left ? matrix.rows : left, t.tensor.cols};
    if (bw_view_expect_shape("out", &out, 2, shape) || expect_apart(&out, &t)) goto done;
    t.tensor.turned = turned;
    bw_release_gil();
    status = bw_trellis_dequantize(&t.tensor, (ptrdiff_t)first, matrix.rows, matrix.dtype, out.data);
    bw_take_gil();
    if (status) bw_raise("dequantize_trellis", status == BW_ERR_INDEX ? "out" : "codes", status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&out);
    bw_trellis_release(&t);
    return result;
}

const char bw_doc_matmul_trellis[] =
    "matmul_trellis(x, codes, scales, rates, width, cols, bias, out, mode=0, turned=False)\n--\n\n"
    "Write x WT + bias into `out`: x (n, cols), bias (rows,) or None, out (n, rows).\n\n"
    "mode: as in matmul; a turned matrix takes activations as they are.";

PyObject *bw_py_matmul_trellis(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"x",    "codes", "scales", "rates", "width",  "cols",
                                        "bias", "out",   "|",      "mode",  "turned", NULL};
    PyObject *v[10], *result = NULL;
    bw_trellis_views t = {0};
    bw_view x = {0}, bias = {0}, out = {0};
    bw_matrix activations, target, added = {0};
    int64_t mode = 0;
    int turned = 0;
    bw_status status;
    if (bw_parse("matmul_trellis", names, args, n_args, keywords, v) || bw_arg_int("mode", v[8], 0, 2, &mode) ||
        bw_arg_flag("turned", v[9], &turned) || bw_view_float_matrix("x", v[0], &x, &activations) ||
        bw_trellis_acquire(v + 1, &t) || bw_view_acquire("out", v[7], BW_WRITABLE | BW_CONTIGUOUS, &out) ||
        bw_view_matrix("out", &out, &target))
        goto done;
    const int64_t x_shape[2] = {activations.rows, t.tensor.cols}, out_shape[2] = {activations.rows, t.tensor.rows};
    int has_bias = v[6] != Py_None;
    t.tensor.turned = turned;
    if (bw_view_expect_shape("x", &x, 2, x_shape) || bw_view_expect_shape("out", &out, 2, out_shape) ||
        expect_apart(&out, &t) || bw_view_expect_apart("out", &out, "x", &x))
        goto done;
    if (has_bias) {
        if (bw_view_acquire("bias", v[6], 0, &bias) || bw_view_expect_shape("bias", &bias, 1, out_shape + 1)) goto done;
        bias.shape[1] = bias.shape[0];
        bias.strides[1] = bias.strides[0];
        bias.shape[0] = 1;
        bias.ndim = 2;
        if (bw_view_matrix("bias", &bias, &added) || bw_view_expect_apart("out", &out, "bias", &bias)) goto done;
    }
    bw_release_gil();
    status =
        bw_trellis_matmul(&activations, &t.tensor, has_bias ? &added : NULL, (bw_mode)mode, target.dtype, out.data);
    bw_take_gil();
    if (status) bw_raise("matmul_trellis", "codes", status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&out);
    bw_view_release(&bias);
    bw_view_release(&x);
    bw_trellis_release(&t);
    return result;
}
