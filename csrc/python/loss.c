/* cross_entropy, kl_divergence, total. */
#include "boundary.h"

static PyObject *new_losses(ptrdiff_t rows, float **data) {
    npy_intp shape[1] = {rows};
    PyObject *array = PyArray_SimpleNew(1, shape, NPY_FLOAT32);
    if (array) *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

const char bw_doc_cross_entropy[] =
    "cross_entropy(logits, targets)\n--\n\n"
    "Negative log-likelihood of each token, float32 (tokens,), from float logits (tokens, vocabulary) and int64\n"
    "targets (tokens,).";

PyObject *bw_py_cross_entropy(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"logits", "targets", NULL};
    PyObject *v[2], *result = NULL;
    bw_view logits = {0}, targets = {0};
    bw_matrix matrix;
    float *out = NULL;
    bw_status status;
    if (bw_parse("cross_entropy", names, args, n_args, keywords, v) ||
        bw_view_float_matrix("logits", v[0], &logits, &matrix))
        goto done;
    const int64_t shape[1] = {matrix.rows};
    if (bw_view_array("targets", v[1], "int64", 1, shape, 0, &targets)) goto done;
    result = new_losses(matrix.rows, &out);
    if (!result) goto done;
    bw_release_gil();
    status = bw_cross_entropy(&matrix, (const int64_t *)targets.data, out);
    bw_take_gil();
    if (status) {
        Py_CLEAR(result);
        bw_raise("cross_entropy", status == BW_ERR_INDEX ? "targets" : "logits", status);
    }
done:
    bw_view_release(&targets);
    bw_view_release(&logits);
    return result;
}

const char bw_doc_kl_divergence[] =
    "kl_divergence(reference, logits)\n--\n\n"
    "KL(softmax(reference) || softmax(logits)) of each token in nats, float32 (tokens,), from two float matrices of\n"
    "logits (tokens, vocabulary).";

PyObject *bw_py_kl_divergence(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"reference", "logits", NULL};
    PyObject *v[2], *result = NULL;
    bw_view reference = {0}, logits = {0};
    bw_matrix first, second;
    float *out = NULL;
    bw_status status;
    if (bw_parse("kl_divergence", names, args, n_args, keywords, v) ||
        bw_view_float_matrix("reference", v[0], &reference, &first) ||
        bw_view_float_matrix("logits", v[1], &logits, &second) ||
        bw_view_expect_shape("logits", &logits, 2, reference.shape))
        goto done;
    result = new_losses(first.rows, &out);
    if (!result) goto done;
    bw_release_gil();
    status = bw_kl_divergence(&first, &second, out);
    bw_take_gil();
    if (status) {
        Py_CLEAR(result);
        bw_raise("kl_divergence", "logits", status);
    }
done:
    bw_view_release(&logits);
    bw_view_release(&reference);
    return result;
}

const char bw_doc_total[] = "total(x)\n--\n\nSum of a float matrix in fp64, always in the same order.";

PyObject *bw_py_total(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"x", NULL};
    PyObject *v[1], *result = NULL;
    bw_view x = {0};
    bw_matrix matrix;
    double sum = 0;
    bw_status status;
    if (bw_parse("total", names, args, n_args, keywords, v) || bw_view_float_matrix("x", v[0], &x, &matrix)) goto done;
    bw_release_gil();
    status = bw_total(&matrix, &sum);
    bw_take_gil();
    if (status) bw_raise("total", "x", status);
    else result = PyFloat_FromDouble(sum);
done:
    bw_view_release(&x);
    return result;
}
