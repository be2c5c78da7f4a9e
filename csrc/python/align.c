/* align. */
#include "boundary.h"

const char bw_doc_align[] =
    "align(weight, hessian, cross, share=1.0, damping=0.01)\n--\n\n"
    "The float32 matrix whose outputs on inputs x come near those of weight (rows, cols) on inputs y, by `share` of\n"
    "the way: hessian, float32 (cols, cols), is E[x xT] and cross, of the same shape, E[x yT].\n\n"
    "Returns (matrix, damping used).";

PyObject *bw_py_align(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight", "hessian", "cross", "|", "share", "damping", NULL};
    PyObject *v[5], *aligned = NULL, *result = NULL;
    bw_view weight = {0}, hessian = {0}, cross = {0};
    bw_matrix matrix;
    double share = 1, damping = 0.01;
    bw_status status;
    if (bw_parse("align", names, args, n_args, keywords, v) || bw_arg_float("share", v[3], 0, 1, &share) ||
        bw_arg_float("damping", v[4], 0, 1000, &damping) || bw_view_float_matrix("weight", v[0], &weight, &matrix))
        goto done;
    const int64_t shape[2] = {matrix.cols, matrix.cols};
    if (bw_view_array("hessian", v[1], "float32", 2, shape, 0, &hessian) ||
        bw_view_array("cross", v[2], "float32", 2, shape, 0, &cross))
        goto done;
    npy_intp size[2] = {matrix.rows, matrix.cols};
    aligned = PyArray_SimpleNew(2, size, NPY_FLOAT32);
    if (!aligned) goto done;
    float *out = PyArray_DATA((PyArrayObject *)aligned);
    bw_release_gil();
    status = bw_align(&matrix, (const float *)hessian.data, (const float *)cross.data, share, &damping, out);
    bw_take_gil();
    int about_hessian = status == BW_ERR_HESSIAN || status == BW_ERR_FACTOR;
    if (status) bw_raise("align", about_hessian ? "hessian" : status == BW_ERR_NONFINITE ? "cross" : "weight", status);
    else result = Py_BuildValue("(Od)", aligned, damping);
done:
    Py_XDECREF(aligned);
    bw_view_release(&weight);
    bw_view_release(&hessian);
    bw_view_release(&cross);
    return result;
}
