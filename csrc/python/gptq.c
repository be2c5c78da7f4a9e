/* quantize_gptq. */
#include "boundary.h"

const char bw_doc_quantize_gptq[] =
    "quantize_gptq(weight, hessian, scheme, damping=0.01, sweeps=0, tolerance=0.001, by_activation=False)\n--\n\n"
    "GPTQ of a (rows, cols) float matrix under hessian, float32 (cols, cols), then `sweeps` of refinement.\n\n"
    "Returns ((codes, scales, zeros or None), row_errors float64 (rows,), damping used, dead columns).";

/* scheme, damping, sweeps, tolerance, by_activation */
static int read_options(PyObject *const *v, bw_scheme *scheme, bw_gptq_options *options) {
    int64_t sweeps = 0;
    int by_activation = 0;
    *options = (bw_gptq_options){.damping = 0.01, .tolerance = 0.001};
    if (bw_arg_scheme("scheme", v[0], scheme) || bw_arg_float("damping", v[1], 0, 1000, &options->damping) ||
        bw_arg_int("sweeps", v[2], 0, 1000, &sweeps) || bw_arg_float("tolerance", v[3], 0, 1, &options->tolerance) ||
        bw_arg_flag("by_activation", v[4], &by_activation))
        return -1;
    options->sweeps = (int32_t)sweeps;
    options->by_activation = by_activation;
    return 0;
}

PyObject *bw_py_quantize_gptq(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight", "hessian",   "scheme",        "|", "damping",
                                        "sweeps", "tolerance", "by_activation", NULL};
    PyObject *v[7], *stored = NULL, *errors = NULL, *result = NULL;
    bw_view weight = {0}, hessian = {0};
    bw_matrix matrix;
    bw_scheme scheme;
    bw_quantized out;
    bw_gptq_options options;
    bw_gptq_report report = {0};
    bw_status status;
    if (bw_parse("quantize_gptq", names, args, n_args, keywords, v) || read_options(v + 2, &scheme, &options) ||
        bw_view_float_matrix("weight", v[0], &weight, &matrix))
        goto done;
    const int64_t shape[2] = {matrix.cols, matrix.cols};
    if (bw_view_array("hessian", v[1], "float32", 2, shape, 0, &hessian)) goto done;
    npy_intp rows = matrix.rows;
    stored = bw_stored_new(matrix.rows, matrix.cols, &scheme, &out);
    errors = stored ? PyArray_ZEROS(1, &rows, NPY_FLOAT64, 0) : NULL;
    if (!errors) goto done;
    report.row_errors = PyArray_DATA((PyArrayObject *)errors);
    bw_release_gil();
    status = bw_quantize_gptq(&matrix, (const float *)hessian.data, &options, &out, &report);
    bw_take_gil();
    int about_hessian = status == BW_ERR_HESSIAN || status == BW_ERR_FACTOR;
    if (status) bw_raise("quantize_gptq", about_hessian ? "hessian" : "weight", status);
    else result = Py_BuildValue("(OOdL)", stored, errors, report.damping, (long long)report.n_dead);
done:
    Py_XDECREF(stored);
    Py_XDECREF(errors);
    bw_view_release(&hessian);
    bw_view_release(&weight);
    return result;
}
