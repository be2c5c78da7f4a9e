/* hessian_add, mirror_upper. */
#include "boundary.h"

const char bw_doc_hessian_add[] =
    "hessian_add(x, hessian, y=None, weights=None)\n--\n\n"
    "Add xT D x of x (tokens, n) to the upper triangle of hessian, float32 (n, n); with y (tokens, m), add xT D y to\n"
    "all of hessian (n, m). D holds `weights`, float32 (tokens,), >= 0; ones when None.";

PyObject *bw_py_hessian_add(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"x", "hessian", "|", "y", "weights", NULL};
    PyObject *v[4], *result = NULL;
    bw_view x = {0}, h = {0}, y = {0}, weights = {0};
    bw_matrix matrix, other;
    bw_status status;
    if (bw_parse("hessian_add", names, args, n_args, keywords, v) || bw_view_float_matrix("x", v[0], &x, &matrix) ||
        (v[2] && bw_view_float_matrix("y", v[2], &y, &other)))
        goto done;
    const int64_t shape[2] = {matrix.cols, v[2] ? other.cols : matrix.cols}, tokens = matrix.rows;
    const int64_t y_shape[2] = {tokens, shape[1]};
    if ((v[2] && bw_view_expect_shape("y", &y, 2, y_shape)) ||
        bw_view_array("hessian", v[1], "float32", 2, shape, BW_WRITABLE, &h) ||
        (v[3] && bw_view_array("weights", v[3], "float32", 1, &tokens, 0, &weights)))
        goto done;
    if (bw_view_expect_apart("hessian", &h, "x", &x) || (v[2] && bw_view_expect_apart("hessian", &h, "y", &y)) ||
        (v[3] && bw_view_expect_apart("hessian", &h, "weights", &weights)))
        goto done;
    bw_release_gil();
    status = bw_hessian_add(&matrix, v[2] ? &other : NULL, (const float *)weights.data, (float *)h.data);
    bw_take_gil();
    const char *argument = status == BW_ERR_ARGUMENT ? "weights" : status == BW_ERR_SHAPE ? "y" : "x";
    if (status) bw_raise("hessian_add", argument, status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&x);
    bw_view_release(&h);
    bw_view_release(&y);
    bw_view_release(&weights);
    return result;
}

const char bw_doc_mirror_upper[] =
    "mirror_upper(hessian)\n--\n\nCopy the upper triangle of a square float32 array over the lower one.";

PyObject *bw_py_mirror_upper(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"hessian", NULL};
    PyObject *v[1], *result = NULL;
    bw_view h = {0};
    bw_status status;
    if (bw_parse("mirror_upper", names, args, n_args, keywords, v) ||
        bw_view_acquire("hessian", v[0], BW_WRITABLE | BW_CONTIGUOUS, &h) || bw_view_expect_ndim("hessian", &h, 2))
        goto done;
    const int64_t shape[2] = {h.shape[0], h.shape[0]};
    if (bw_view_expect_shape("hessian", &h, 2, shape) || bw_view_expect_dtype("hessian", &h, "float32")) goto done;
    bw_release_gil();
    status = bw_mirror_upper((ptrdiff_t)shape[0], (float *)h.data);
    bw_take_gil();
    if (status) bw_raise("mirror_upper", "hessian", status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&h);
    return result;
}
