/* info, set_isa, set_num_threads, get_num_threads, borrow_threads. */
#include "boundary.h"

static PyObject *supported_isas(void) {
    PyObject *list = PyList_New(0);
    int supported;
    const char *name;
    for (int i = 0; list && (name = bw_isa_list(i, &supported)); i++) {
        if (!supported) continue;
        PyObject *text = PyUnicode_FromString(name);
        if (!text || PyList_Append(list, text)) Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

const char bw_doc_info[] = "info()\n--\n\nWhat the core runs on: version, isa, isas, threads, blas, blas_core.";

PyObject *bw_py_info(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {NULL};
    if (bw_parse("info", names, args, n_args, keywords, NULL)) return NULL;
    PyObject *isas = supported_isas();
    if (!isas) return NULL;
    return Py_BuildValue("{s:s,s:s,s:N,s:i,s:s,s:s}", "version", BW_VERSION, "isa", bw_isa_name(), "isas", isas,
                         "threads", bw_get_num_threads(), "blas", bw_blas_name(), "blas_core", bw_blas_core());
}

const char bw_doc_set_isa[] = "set_isa(name=None)\n--\n\nUse this instruction set from now on; None takes the best.";

PyObject *bw_py_set_isa(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"|", "name", NULL};
    PyObject *v[1];
    if (bw_parse("set_isa", names, args, n_args, keywords, v)) return NULL;
    const char *name = NULL;
    if (v[0]) {
        if (!PyUnicode_Check(v[0])) return PyErr_Format(PyExc_TypeError, "name: expected a string; got %R", v[0]);
        name = PyUnicode_AsUTF8AndSize(v[0], NULL);
        if (!name) return NULL;
    }
    if (!bw_choose_isa(name)) Py_RETURN_NONE;
    PyObject *isas = supported_isas();
    if (isas) PyErr_Format(PyExc_ValueError, "BITWEEN_ISA: expected one of %R on this CPU; got %R", isas, v[0]);
    Py_XDECREF(isas);
    return NULL;
}

const char bw_doc_set_num_threads[] = "set_num_threads(n)\n--\n\nThreads that work on one call, 1 .. 1024.";

PyObject *bw_py_set_num_threads(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"n", NULL};
    PyObject *v[1];
    int64_t n = 1;
    if (bw_parse("set_num_threads", names, args, n_args, keywords, v) || bw_arg_int("n", v[0], 1, 1024, &n))
        return NULL;
    bw_status status = bw_set_num_threads((int)n);
    if (status) return bw_raise("set_num_threads", "n", status);
    Py_RETURN_NONE;
}

const char bw_doc_get_num_threads[] = "get_num_threads()\n--\n\nThreads that work on one call.";

PyObject *bw_py_get_num_threads(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {NULL};
    if (bw_parse("get_num_threads", names, args, n_args, keywords, NULL)) return NULL;
    return PyLong_FromLong(bw_get_num_threads());
}

const char bw_doc_borrow_threads[] =
    "borrow_threads()\n--\n\nWork on the OpenMP threads that are in the process already; whether there are any.";

PyObject *bw_py_borrow_threads(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {NULL};
    if (bw_parse("borrow_threads", names, args, n_args, keywords, NULL)) return NULL;
    return PyBool_FromLong(bw_borrow_threads());
}
