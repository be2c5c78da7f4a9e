/* The parts of a decoder, from the tuples that describe them. */
#include "boundary.h"

int bw_expect_tuple(const char *name, PyObject *object, Py_ssize_t n) {
    if (PyTuple_Check(object) && (n < 0 || PyTuple_Size(object) == n)) return 0;
    if (n < 0) PyErr_Format(PyExc_TypeError, "%s: expected a tuple; got %R", name, object);
    else PyErr_Format(PyExc_TypeError, "%s: expected a tuple of %zd; got %R", name, n, object);
    return -1;
}

int bw_expect_range(const char *name, Py_ssize_t n, Py_ssize_t least, Py_ssize_t most) {
    if (least <= n && n <= most) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %zd .. %zd; got %zd", name, least, most, n);
    return -1;
}

int bw_vector_acquire(const char *name, PyObject *object, bw_view *view, bw_matrix *matrix) {
    if (bw_view_acquire(name, object, 0, view) || bw_view_expect_ndim(name, view, 1)) return -1;
    view->ndim = 2;
    view->shape[1] = view->shape[0];
    view->strides[1] = view->strides[0];
    view->shape[0] = 1;
    view->strides[0] = 0;
    return bw_view_matrix(name, view, matrix);
}

static int acquire_bias(PyObject *bias, PyObject *mode, bw_linear_views *views, bw_linear *linear) {
    int64_t number = 0;
    if (mode && bw_arg_int("mode", mode, 0, 2, &number)) return -1;
    linear->mode = (bw_mode)number;
    return bias == Py_None ? 0 : bw_vector_acquire("bias", bias, &views->bias, &linear->bias);
}

int bw_linear_acquire(PyObject *layer, bw_linear_views *views, bw_linear *linear) {
    PyObject *v[8] = {NULL};
    if (bw_expect_tuple("linears", layer, -1)) return -1;
    Py_ssize_t n = PyTuple_Size(layer);
    for (Py_ssize_t i = 0; i < n && i < 8; i++) v[i] = PyTuple_GetItem(layer, i);
    *linear = (bw_linear){0};
    int named = n > 0 && PyUnicode_Check(v[0]);
    if (n == 9 || n == 4) { /* the last item says when the bias is added */
        if (bw_arg_flag("late", PyTuple_GetItem(layer, n - 1), &linear->late_bias)) return -1;
        n--;
    }
    if (named && n == 8 && !PyUnicode_CompareWithASCIIString(v[0], "packed")) {
        linear->kind = BW_PACKED;
        if (bw_stored_acquire(v[1], v[2], v[3] == Py_None ? NULL : v[3], v[4], v[5], &views->stored)) return -1;
        linear->packed = views->stored.tensor;
        linear->rows = linear->packed.rows, linear->cols = linear->packed.cols;
        return acquire_bias(v[6], v[7], views, linear);
    }
    if (named && n == 8 && !PyUnicode_CompareWithASCIIString(v[0], "trellis")) {
        linear->kind = BW_TRELLIS;
        if (bw_trellis_acquire(v + 1, &views->trellis)) return -1;
        linear->trellis = views->trellis.tensor;
        linear->rows = linear->trellis.rows, linear->cols = linear->trellis.cols;
        return acquire_bias(v[6], v[7], views, linear);
    }
    if (named && n == 3 && !PyUnicode_CompareWithASCIIString(v[0], "plain")) {
        linear->kind = BW_PLAIN;
        if (bw_view_float_matrix("weight", v[1], &views->plain, &linear->plain)) return -1;
        linear->rows = linear->plain.rows, linear->cols = linear->plain.cols;
        return acquire_bias(v[2], NULL, views, linear);
    }
    PyErr_Format(PyExc_ValueError, "linears: expected ('packed', 7 more), ('trellis', 7 more) or ('plain', 2 more), "
                                   "or True after these");
    return -1;
}

void bw_linear_release(bw_linear_views *views) {
    bw_stored_release(&views->stored);
    bw_trellis_release(&views->trellis);
    bw_view_release(&views->plain);
    bw_view_release(&views->bias);
}

int bw_norm_acquire(PyObject *norm, bw_view *view, bw_norm *out) {
    *out = (bw_norm){0};
    if (norm == Py_None) return 0;
    int64_t kind = 0;
    double eps = 0;
    if (bw_expect_tuple("norms", norm, 3) ||
        bw_arg_int("kind", PyTuple_GetItem(norm, 0), BW_GAIN_NONE, BW_GAIN_PLUS_ONE, &kind) ||
        bw_arg_float("eps", PyTuple_GetItem(norm, 1), 0, 1, &eps))
        return -1;
    out->present = 1;
    out->kind = (bw_gain)kind;
    out->eps = (float)eps;
    return kind == BW_GAIN_NONE ? 0 : bw_vector_acquire("gain", PyTuple_GetItem(norm, 2), view, &out->gain);
}

int bw_part_of(PyObject *part, const bw_linear *linears, Py_ssize_t n_linears, bw_part *out) {
    int64_t index = 0, first = 0, rows = 0;
    *out = (bw_part){0};
    if (part == Py_None) return 0;
    if (bw_expect_tuple("parts", part, 3) || bw_arg_int("layer", PyTuple_GetItem(part, 0), 0, n_linears - 1, &index) ||
        bw_arg_int("first", PyTuple_GetItem(part, 1), 0, PTRDIFF_MAX, &first) ||
        bw_arg_int("rows", PyTuple_GetItem(part, 2), 1, PTRDIFF_MAX, &rows))
        return -1;
    *out = (bw_part){linears + index, (ptrdiff_t)first, (ptrdiff_t)rows};
    return 0;
}
