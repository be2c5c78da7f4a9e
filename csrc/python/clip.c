/* quantize_clip. */
#include "boundary.h"

const char bw_doc_quantize_clip[] =
    "quantize_clip(weight, scheme, importance=None)\n--\n\n"
    "Quantize a (rows, cols) float matrix on each group's best range.\n\n"
    "scheme is (levels, group_size, symmetric); importance a float (rows, cols) or (cols,), >= 0: the weight of each\n"
    "squared error. Returns (codes, scales, zeros or None).";

PyObject *bw_py_quantize_clip(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight", "scheme", "|", "importance", NULL};
    PyObject *v[3], *result = NULL;
    bw_view weight = {0}, importance = {0};
    bw_matrix matrix, counts;
    bw_scheme scheme;
    bw_quantized out;
    bw_status status = BW_OK;
    if (bw_parse("quantize_clip", names, args, n_args, keywords, v) || bw_arg_scheme("scheme", v[1], &scheme) ||
        bw_view_float_matrix("weight", v[0], &weight, &matrix) ||
        (v[2] && bw_view_importance(v[2], &matrix, &importance, &counts)))
        goto done;
    result = bw_stored_new(matrix.rows, matrix.cols, &scheme, &out);
    if (!result) goto done;
    bw_release_gil();
    status = bw_quantize_clip(&matrix, v[2] ? &counts : NULL, &out);
    bw_take_gil();
    if (status) {
        Py_CLEAR(result);
        bw_raise("quantize_clip", "weight", status);
    }
done:
    bw_view_release(&importance);
    bw_view_release(&weight);
    return result;
}
