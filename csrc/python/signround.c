/* train_forward, train_backward. */
#include "boundary.h"

typedef struct {
    bw_view weight, offset, low, high;
    bw_rounding rounding;
} held;

/* weight, offset, low, high, scheme */
static int acquire(PyObject *const *v, held *h) {
    bw_layout layout;
    bw_rounding *r = &h->rounding;
    if (bw_arg_scheme("scheme", v[4], &r->scheme) || bw_view_acquire("weight", v[0], BW_CONTIGUOUS, &h->weight) ||
        bw_view_expect_dtype("weight", &h->weight, "float32") || bw_view_expect_ndim("weight", &h->weight, 2))
        return -1;
    r->rows = (ptrdiff_t)h->weight.shape[0];
    r->cols = (ptrdiff_t)h->weight.shape[1];
    bw_status status = bw_scheme_layout(&r->scheme, r->rows, r->cols, &layout);
    if (status) {
        bw_raise("a trained rounding", "weight", status);
        return -1;
    }
    const int64_t groups[2] = {r->rows, layout.n_groups};
    if (bw_view_array("offset", v[1], "float32", 2, h->weight.shape, 0, &h->offset) ||
        bw_view_array("high", v[3], "float32", 2, groups, 0, &h->high))
        return -1;
    if (!r->scheme.symmetric && bw_view_array("low", v[2], "float32", 2, groups, 0, &h->low)) return -1;
    r->weight = (const float *)h->weight.data;
    r->offset = (const float *)h->offset.data;
    r->low = (const float *)h->low.data;
    r->high = (const float *)h->high.data;
    return 0;
}

static void release(held *h) {
    bw_view_release(&h->weight);
    bw_view_release(&h->offset);
    bw_view_release(&h->low);
    bw_view_release(&h->high);
}

static int expect_apart(const char *name, const bw_view *out, const held *h) {
    return bw_view_expect_apart(name, out, "weight", &h->weight) ||
           bw_view_expect_apart(name, out, "offset", &h->offset) || bw_view_expect_apart(name, out, "low", &h->low) ||
           bw_view_expect_apart(name, out, "high", &h->high);
}

const char bw_doc_train_forward[] =
    "train_forward(weight, offset, low, high, scheme, out)\n--\n\n"
    "Write weight, rounded with offsets on the grids that span low .. high, as numbers into out; all float32,\n"
    "weight, offset and out (rows, cols), low and high (rows, n_groups). low is not read when symmetric.";

PyObject *bw_py_train_forward(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight", "offset", "low", "high", "scheme", "out", NULL};
    PyObject *v[6], *result = NULL;
    held h = {0};
    bw_view out = {0};
    bw_status status;
    if (bw_parse("train_forward", names, args, n_args, keywords, v) || acquire(v, &h) ||
        bw_view_array("out", v[5], "float32", 2, h.weight.shape, BW_WRITABLE, &out) || expect_apart("out", &out, &h))
        goto done;
    bw_release_gil();
    status = bw_train_forward(&h.rounding, (float *)out.data);
    bw_take_gil();
    if (status) bw_raise("train_forward", "weight", status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&out);
    release(&h);
    return result;
}

const char bw_doc_train_backward[] =
    "train_backward(weight, offset, low, high, scheme, grad, into_offset, into_low, into_high)\n--\n\n"
    "Straight-through gradient of train_forward: grad, with respect to its output, is carried to offset, low and "
    "high.\n"
    "into_low is not written when symmetric.";

PyObject *bw_py_train_backward(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight", "offset",      "low",      "high",      "scheme",
                                        "grad",   "into_offset", "into_low", "into_high", NULL};
    PyObject *v[9], *result = NULL;
    held h = {0};
    bw_view grad = {0}, into_offset = {0}, into_low = {0}, into_high = {0};
    bw_status status;
    if (bw_parse("train_backward", names, args, n_args, keywords, v) || acquire(v, &h) ||
        bw_view_array("grad", v[5], "float32", 2, h.weight.shape, 0, &grad) ||
        bw_view_array("into_offset", v[6], "float32", 2, h.weight.shape, BW_WRITABLE, &into_offset) ||
        (!h.rounding.scheme.symmetric &&
         bw_view_array("into_low", v[7], "float32", 2, h.high.shape, BW_WRITABLE, &into_low)) ||
        bw_view_array("into_high", v[8], "float32", 2, h.high.shape, BW_WRITABLE, &into_high))
        goto done;
    const bw_view *outs[] = {&into_offset, &into_low, &into_high};
    for (int i = 0; i < 3; i++) {
        if (expect_apart(names[6 + i], outs[i], &h) || bw_view_expect_apart(names[6 + i], outs[i], "grad", &grad))
            goto done;
        for (int j = 0; j < 3; j++)
            if (j != i && bw_view_expect_apart(names[6 + i], outs[i], names[6 + j], outs[j])) goto done;
    }
    bw_release_gil();
    status = bw_train_backward(&h.rounding, (const float *)grad.data, (float *)into_offset.data, (float *)into_low.data,
                               (float *)into_high.data);
    bw_take_gil();
    if (status && bw_view_size(&h.weight)) bw_raise("train_backward", "grad", status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&grad);
    bw_view_release(&into_offset);
    bw_view_release(&into_low);
    bw_view_release(&into_high);
    release(&h);
    return result;
}
