/* route: which experts logits choose, as a decoder's step does it. */
#include "boundary.h"

const char bw_doc_route[] =
    "route(logits, experts, weights, over_all=False, divided=False, dtype=0)\n--\n\n"
    "Of each row of float32 logits (rows, n) the experts that are chosen, the best first, into `experts`, int64\n"
    "(rows, chosen), and their weights into `weights`, float32 (rows, chosen); all contiguous. Among equal ones those\n"
    "that torch.topk takes. Weights are a softmax over all logits or over the chosen ones, divided by the chosen "
    "ones'\n"
    "sum or not, and rounded to a dtype by its number.";

PyObject *bw_py_route(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"logits", "experts", "weights", "|", "over_all", "divided", "dtype", NULL};
    PyObject *v[6], *result = NULL;
    bw_view logits = {0}, experts = {0}, weights = {0};
    bw_routing routing = {0};
    int64_t dtype = 0;
    if (bw_parse("route", names, args, n_args, keywords, v) || bw_arg_flag("over_all", v[3], &routing.over_all) ||
        bw_arg_flag("divided", v[4], &routing.divided) || bw_arg_int("dtype", v[5], BW_F32, BW_BF16, &dtype) ||
        bw_view_acquire("logits", v[0], BW_CONTIGUOUS, &logits) || bw_view_expect_dtype("logits", &logits, "float32") ||
        bw_view_expect_ndim("logits", &logits, 2) ||
        bw_view_acquire("experts", v[1], BW_CONTIGUOUS | BW_WRITABLE, &experts) ||
        bw_view_expect_dtype("experts", &experts, "int64") || bw_view_expect_ndim("experts", &experts, 2))
        goto done;
    const int64_t shape[2] = {logits.shape[0], experts.shape[1]};
    if (bw_view_expect_shape("experts", &experts, 2, shape) ||
        bw_view_array("weights", v[2], "float32", 2, shape, BW_WRITABLE, &weights) ||
        bw_view_expect_apart("experts", &experts, "logits", &logits) ||
        bw_view_expect_apart("weights", &weights, "logits", &logits) ||
        bw_view_expect_apart("experts", &experts, "weights", &weights) ||
        bw_expect_range("logits", (Py_ssize_t)logits.shape[1], 1, BW_MOST_EXPERTS) ||
        bw_expect_range("experts", (Py_ssize_t)shape[1], 1,
                        (Py_ssize_t)(logits.shape[1] < BW_MOST_CHOSEN ? logits.shape[1] : BW_MOST_CHOSEN)))
        goto done;
    routing.n = (ptrdiff_t)logits.shape[1];
    routing.chosen = (ptrdiff_t)shape[1];
    routing.dtype = (bw_dtype)dtype;
    bw_release_gil();
    bw_status status = bw_route(&routing, (const float *)(const void *)logits.data, (ptrdiff_t)shape[0],
                                (int64_t *)(void *)experts.data, (float *)(void *)weights.data);
    bw_take_gil();
    if (status) bw_raise("route", "logits", status);
    else result = Py_NewRef(Py_None);
done:
    bw_view_release(&logits);
    bw_view_release(&experts);
    bw_view_release(&weights);
    return result;
}
