/* matmul. */
#include "boundary.h"

/* A tensor (..., cols) as a matrix: leading dimensions are folded into rows, which their strides must allow. */
static int view_rows(const char *name, bw_view *view, bw_matrix *matrix) {
    int64_t rows = 1, stride = 0;
    int last = view->ndim - 1, seen = 0;
    if (last < 0) return bw_view_expect_ndim(name, view, 1);
    for (int i = last - 1; i >= 0; i--) {
        if (seen && view->shape[i] != 1 && rows != 0 && view->strides[i] != stride * rows) {
            PyErr_Format(PyExc_ValueError, "%s: expected leading dimensions that fold into rows (call .contiguous())",
                         name);
            return -1;
        }
        if (!seen && view->shape[i] != 1) {
            stride = view->strides[i];
            seen = 1;
        }
        if (__builtin_mul_overflow(rows, view->shape[i], &rows)) { /* only an empty tensor gets this far */
            bw_raise("matmul", name, BW_ERR_OVERFLOW);
            return -1;
        }
    }
    view->strides[1] = view->strides[last];
    view->shape[1] = view->shape[last];
    view->strides[0] = stride;
    view->shape[0] = rows;
    view->ndim = 2;
    return bw_view_matrix(name, view, matrix);
}

const char bw_doc_matmul[] =
    "matmul(x, codes, scales, zeros, scheme, cols, bias, out, mode=0)\n--\n\n"
    "Write x WT + bias into `out`: x (..., cols), bias (rows,) or None, out contiguous (..., rows).\n\n"
    "mode: 0 takes activations as they are, 1 and 2 round them to as many bytes where x has at most 16 rows.";

PyObject *bw_py_matmul(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"x",    "codes", "scales", "zeros", "scheme", "cols",
                                        "bias", "out",   "|",      "mode",  NULL};
    PyObject *v[9], *result = NULL;
    bw_view x = {0}, bias = {0}, out = {0};
    bw_stored stored = {0};
    bw_matrix activations, added = {0}, target;
    int64_t mode = 0;
    bw_status status;
    if (bw_parse("matmul", names, args, n_args, keywords, v) || bw_arg_int("mode", v[8], 0, 2, &mode) ||
        bw_stored_acquire(v[1], v[2], v[3] == Py_None ? NULL : v[3], v[4], v[5], &stored) ||
        bw_view_acquire("x", v[0], 0, &x) || view_rows("x", &x, &activations) ||
        bw_view_acquire("out", v[7], BW_WRITABLE | BW_CONTIGUOUS, &out) || view_rows("out", &out, &target))
        goto done;
    if (v[6] != Py_None && (bw_view_acquire("bias", v[6], 0, &bias) || bw_view_expect_ndim("bias", &bias, 1) ||
                            view_rows("bias", &bias, &added)))
        goto done;
    const int64_t x_shape[2] = {activations.rows, stored.tensor.cols}, bias_shape[2] = {1, stored.tensor.rows},
                  out_shape[2] = {activations.rows, stored.tensor.rows};
    if (bw_view_expect_shape("x", &x, 2, x_shape) || bw_view_expect_shape("out", &out, 2, out_shape) ||
        (v[6] != Py_None &&
         (bw_view_expect_shape("bias", &bias, 2, bias_shape) || bw_view_expect_apart("out", &out, "bias", &bias))) ||
        bw_view_expect_apart("out", &out, "x", &x) || bw_stored_expect_apart("out", &out, &stored))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    status =
        bw_matmul(&activations, &stored.tensor, v[6] == Py_None ? NULL : &added, (bw_mode)mode, target.dtype, out.data);
    Py_END_ALLOW_THREADS
    if (status) bw_raise("matmul", "codes", status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&out);
    bw_view_release(&bias);
    bw_view_release(&x);
    bw_stored_release(&stored);
    return result;
}
