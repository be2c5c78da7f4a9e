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

/* What one product holds on to besides the activations. */
typedef struct {
    bw_stored stored;
    bw_view bias, out;
    bw_matrix added;
    int has_bias;
    bw_dtype dtype;
} bw_factor;

static int acquire_factor(PyObject *const *layer, PyObject *out, const bw_view *x, const bw_matrix *activations,
                          bw_factor *f) {
    bw_matrix target;
    f->has_bias = layer[5] != Py_None;
    if (bw_stored_acquire(layer[0], layer[1], layer[2] == Py_None ? NULL : layer[2], layer[3], layer[4], &f->stored) ||
        bw_view_acquire("out", out, BW_WRITABLE | BW_CONTIGUOUS, &f->out) || view_rows("out", &f->out, &target))
        return -1;
    if (f->has_bias && (bw_view_acquire("bias", layer[5], 0, &f->bias) || bw_view_expect_ndim("bias", &f->bias, 1) ||
                        view_rows("bias", &f->bias, &f->added)))
        return -1;
    const int64_t x_shape[2] = {activations->rows, f->stored.tensor.cols}, bias_shape[2] = {1, f->stored.tensor.rows},
                  out_shape[2] = {activations->rows, f->stored.tensor.rows};
    f->dtype = target.dtype;
    if (bw_view_expect_shape("x", x, 2, x_shape) || bw_view_expect_shape("out", &f->out, 2, out_shape)) return -1;
    if (f->has_bias && (bw_view_expect_shape("bias", &f->bias, 2, bias_shape) ||
                        bw_view_expect_apart("out", &f->out, "bias", &f->bias)))
        return -1;
    return bw_view_expect_apart("out", &f->out, "x", x) || bw_stored_expect_apart("out", &f->out, &f->stored) ? -1 : 0;
}

static void release_factor(bw_factor *f) {
    bw_view_release(&f->out);
    bw_view_release(&f->bias);
    bw_stored_release(&f->stored);
}

static int multiply(const char *verb, const bw_matrix *x, const bw_factor *factors, int n, int64_t mode) {
    const bw_quantized *weights[BW_MOST_TOGETHER];
    const bw_matrix *biases[BW_MOST_TOGETHER];
    void *outs[BW_MOST_TOGETHER];
    bw_status status;
    for (int i = 0; i < n; i++) {
        weights[i] = &factors[i].stored.tensor;
        biases[i] = factors[i].has_bias ? &factors[i].added : NULL;
        outs[i] = factors[i].out.data;
    }
    bw_release_gil();
    status = bw_matmul_together(x, n, weights, biases, (bw_mode)mode, n ? factors->dtype : BW_F32, outs);
    bw_take_gil();
    if (status) bw_raise(verb, "codes", status);
    return status ? -1 : 0;
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
    bw_view x = {0};
    bw_factor factor = {0};
    bw_matrix activations;
    int64_t mode = 0;
    if (bw_parse("matmul", names, args, n_args, keywords, v) || bw_arg_int("mode", v[8], 0, 2, &mode) ||
        bw_view_acquire("x", v[0], 0, &x) || view_rows("x", &x, &activations))
        goto done;
    if (!acquire_factor(v + 1, v[7], &x, &activations, &factor) && !multiply("matmul", &activations, &factor, 1, mode))
        result = Py_NewRef(Py_None);
done:
    release_factor(&factor);
    bw_view_release(&x);
    return result;
}

/* All factors of matmul_together, in an array of BW_MOST_TOGETHER that the caller releases; how many, -1 after an
 * error. */
static int acquire_factors(PyObject *layers, PyObject *outs, const bw_view *x, const bw_matrix *activations,
                           bw_factor *factors) {
    Py_ssize_t n = PyTuple_Check(layers) ? PyTuple_Size(layers) : -1,
               n_outs = PyTuple_Check(outs) ? PyTuple_Size(outs) : -1;
    if (n < 0 || n_outs < 0) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tuple; got %R", n < 0 ? "layers" : "outs", n < 0 ? layers : outs);
        return -1;
    }
    if (n > BW_MOST_TOGETHER || n_outs != n) {
        PyErr_Format(PyExc_ValueError, "layers: expected at most %d, and as many outs; got %zd and %zd",
                     BW_MOST_TOGETHER, n, n_outs);
        return -1;
    }
    for (Py_ssize_t k = 0; k < n; k++) {
        PyObject *layer = PyTuple_GetItem(layers, k), *parts[6];
        if (!PyTuple_Check(layer) || PyTuple_Size(layer) != 6) {
            PyErr_Format(PyExc_TypeError, "layers: expected tuples of 6; got %R", layer);
            return -1;
        }
        for (int i = 0; i < 6; i++) parts[i] = PyTuple_GetItem(layer, i);
        bw_factor *f = &factors[k];
        if (acquire_factor(parts, PyTuple_GetItem(outs, k), x, activations, f)) return -1;
        if (f->dtype != factors->dtype) {
            PyErr_SetString(PyExc_TypeError, "outs: expected one dtype");
            return -1;
        }
        for (const bw_factor *other = factors; other < f; other++)
            if (bw_view_expect_apart("outs", &f->out, "outs", &other->out) ||
                bw_stored_expect_apart("outs", &f->out, &other->stored) ||
                bw_stored_expect_apart("outs", &other->out, &f->stored))
                return -1;
    }
    return (int)n;
}

const char bw_doc_matmul_together[] =
    "matmul_together(x, layers, outs, mode=0)\n--\n\n"
    "matmul of one x with up to 4 layers in one parallel region, the same bits as one at a time.\n\n"
    "layers: a tuple of tuples (codes, scales, zeros, scheme, cols, bias); outs: a tuple of as many tensors, of one "
    "dtype,\nthat share no memory.";

PyObject *bw_py_matmul_together(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"x", "layers", "outs", "|", "mode", NULL};
    PyObject *v[4], *result = NULL;
    bw_view x = {0};
    bw_factor factors[BW_MOST_TOGETHER] = {0};
    bw_matrix activations;
    int64_t mode = 0;
    if (bw_parse("matmul_together", names, args, n_args, keywords, v) || bw_arg_int("mode", v[3], 0, 2, &mode))
        goto done;
    if (bw_view_acquire("x", v[0], 0, &x) || view_rows("x", &x, &activations)) goto done;
    int n = acquire_factors(v[1], v[2], &x, &activations, factors);
    if (n >= 0 && !multiply("matmul_together", &activations, factors, n, mode)) result = Py_NewRef(Py_None);
done:
    for (int i = 0; i < BW_MOST_TOGETHER; i++) release_factor(&factors[i]);
    bw_view_release(&x);
    return result;
}
