/* search. */
#include <stdlib.h>

#include "boundary.h"

const char bw_doc_search[] =
    "search(weight, schemes, importance=None, row_importance=None, clip=False)\n--\n\n"
    "Squared error of a (rows, cols) float matrix under each scheme, float64 (len(schemes),).\n\n"
    "schemes is a tuple of (levels, group_size, symmetric). importance, (rows, cols) or (cols,), weights squared\n"
    "errors; row_importance, float64 (rows,), weights rows. Ranges are min-max, or with clip the best ones.";

/* The tuple as an array to be freed; NULL with an exception. */
static bw_scheme *parse_schemes(PyObject *tuple, Py_ssize_t *n) {
    if (!PyTuple_Check(tuple)) {
        PyErr_Format(PyExc_TypeError, "schemes: expected a tuple; got %R", tuple);
        return NULL;
    }
    *n = PyTuple_Size(tuple);
    bw_scheme *schemes = calloc((size_t)*n + 1, sizeof *schemes);
    if (!schemes) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < *n; i++)
        if (bw_arg_scheme("schemes", PyTuple_GetItem(tuple, i), &schemes[i])) {
            free(schemes);
            return NULL;
        }
    return schemes;
}

PyObject *bw_py_search(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"weight", "schemes", "|", "importance", "row_importance", "clip", NULL};
    PyObject *v[5], *result = NULL;
    bw_view weight = {0}, importance = {0}, rows = {0};
    bw_matrix matrix, counts;
    bw_scheme *schemes = NULL;
    Py_ssize_t n = 0;
    int clip = 0;
    if (bw_parse("search", names, args, n_args, keywords, v) || !(schemes = parse_schemes(v[1], &n)) ||
        bw_arg_flag("clip", v[4], &clip) || bw_view_float_matrix("weight", v[0], &weight, &matrix) ||
        (v[2] && bw_view_importance(v[2], &matrix, &importance, &counts)))
        goto done;
    const int64_t shape[1] = {matrix.rows};
    if (v[3] && bw_view_array("row_importance", v[3], "float64", 1, shape, 0, &rows)) goto done;
    npy_intp out_shape[1] = {n};
    result = PyArray_SimpleNew(1, out_shape, NPY_FLOAT64);
    if (!result) goto done;
    bw_status status;
    double *out = PyArray_DATA((PyArrayObject *)result);
    bw_release_gil();
    status = bw_search(&matrix, schemes, n, v[2] ? &counts : NULL, v[3] ? (const double *)rows.data : NULL, clip, out);
    bw_take_gil();
    if (status) {
        Py_CLEAR(result);
        bw_raise("search", "weight", status);
    }
done:
    bw_view_release(&rows);
    bw_view_release(&importance);
    bw_view_release(&weight);
    free(schemes);
    return result;
}
