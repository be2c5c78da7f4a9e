/* unchanged: whether Python objects are what they were. It stands before every step of a decoder, so it is quick. */
#include "boundary.h"

/* 1 when every dictionary of a tuple is empty, or, with a key, lacks it; 0 when not; -1 after an error. */
static int lacks_all(PyObject *dicts, PyObject *key) {
    Py_ssize_t n = PyTuple_Size(dicts);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *dict = PyTuple_GetItem(dicts, i);
        if (!PyDict_Check(dict)) {
            PyErr_Format(PyExc_TypeError, "empty, absent: expected dictionaries; got %R", dict);
            return -1;
        }
        if (!key) {
            if (PyDict_Size(dict)) return 0;
        } else if (PyDict_GetItemWithError(dict, key)) return 0;
        else if (PyErr_Occurred()) return -1;
    }
    return 1;
}

/* Triples: dictionary, key, the very object that stands there. */
static int holds_all(PyObject *same) {
    Py_ssize_t n = PyTuple_Size(same);
    for (Py_ssize_t i = 0; i + 2 < n; i += 3) {
        PyObject *dict = PyTuple_GetItem(same, i);
        if (!PyDict_Check(dict)) {
            PyErr_Format(PyExc_TypeError, "same: expected dictionaries; got %R", dict);
            return -1;
        }
        PyObject *held = PyDict_GetItemWithError(dict, PyTuple_GetItem(same, i + 1));
        if (!held && PyErr_Occurred()) return -1;
        if (held != PyTuple_GetItem(same, i + 2)) return 0;
    }
    return 1;
}

/* Pairs: a function without arguments, what it returned. */
static int answers_all(PyObject *answers) {
    Py_ssize_t n = PyTuple_Size(answers);
    for (Py_ssize_t i = 0; i + 1 < n; i += 2) {
        PyObject *answer = PyObject_CallNoArgs(PyTuple_GetItem(answers, i));
        if (!answer) return -1;
        int equal = PyObject_RichCompareBool(answer, PyTuple_GetItem(answers, i + 1), Py_EQ);
        Py_DECREF(answer);
        if (equal != 1) return equal;
    }
    return 1;
}

const char bw_doc_unchanged[] =
    "unchanged(empty, absent, key, same, answers)\n--\n\n"
    "Whether the dictionaries of `empty` are empty, those of `absent` lack `key`, the triples (dictionary, key, object) "
    "of\n`same` hold the very object, and the pairs (function, value) of `answers` answer with it. Flat tuples all.";

PyObject *bw_py_unchanged(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"empty", "absent", "key", "same", "answers", NULL};
    PyObject *v[5];
    if (bw_parse("unchanged", names, args, n_args, keywords, v)) return NULL;
    for (int i = 0; i < 5; i++)
        if (i != 2 && bw_expect_tuple(names[i], v[i], -1)) return NULL;
    int answer = lacks_all(v[0], NULL);
    if (answer == 1) answer = lacks_all(v[1], v[2]);
    if (answer == 1) answer = holds_all(v[3]);
    if (answer == 1) answer = answers_all(v[4]);
    return answer < 0 ? NULL : PyBool_FromLong(answer);
}
