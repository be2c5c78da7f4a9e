/* Arguments to C values, with errors that say argument, expected, got. */
#include <string.h>

#include "boundary.h"

static int find_name(const char *const *names, PyObject *keyword) {
    for (int i = 0, at = 0; names[i]; i++) {
        if (names[i][0] == '|') continue;
        if (PyUnicode_CompareWithASCIIString(keyword, names[i]) == 0) return at;
        at++;
    }
    return -1;
}

static int count_names(const char *const *names, int *n_required) {
    int n = 0;
    *n_required = -1;
    for (int i = 0; names[i]; i++) {
        if (names[i][0] == '|') *n_required = n;
        else n++;
    }
    if (*n_required < 0) *n_required = n;
    return n;
}

static int fill_keywords(const char *function, const char *const *names, PyObject *const *args, PyObject *keywords,
                         PyObject **values) {
    Py_ssize_t n = keywords ? PyTuple_Size(keywords) : 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *keyword = PyTuple_GetItem(keywords, i);
        int at = find_name(names, keyword);
        if (at < 0) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", function, keyword);
            return -1;
        }
        if (values[at]) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%U'", function, keyword);
            return -1;
        }
        values[at] = args[i];
    }
    return 0;
}

int bw_parse(const char *function, const char *const *names, PyObject *const *args, Py_ssize_t n_args,
             PyObject *keywords, PyObject **values) {
    int n_required, n = count_names(names, &n_required);
    for (int i = 0; i < n; i++) values[i] = i < n_args ? args[i] : NULL;
    if (n_args > n) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments; got %zd", function, n, n_args);
        return -1;
    }
    if (fill_keywords(function, names, args + n_args, keywords, values)) return -1;
    for (int i = 0, at = 0; names[i]; i++) {
        if (names[i][0] == '|') continue;
        if (at < n_required && !values[at]) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument '%s'", function, names[i]);
            return -1;
        }
        if (at >= n_required && values[at] == Py_None) values[at] = NULL;
        at++;
    }
    return 0;
}

int bw_arg_int(const char *name, PyObject *value, int64_t low, int64_t high, int64_t *out) {
    if (!value) return 0;
    PyObject *index = PyBool_Check(value) ? NULL : PyNumber_Index(value);
    if (!index) {
        if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s: expected an integer; got %R", name, value);
        }
        return -1;
    }
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (!overflow && number == -1 && PyErr_Occurred()) return -1;
    if (overflow || number < low || number > high) {
        PyErr_Format(PyExc_ValueError, "%s: expected %lld .. %lld; got %R", name, (long long)low, (long long)high,
                     value);
        return -1;
    }
    *out = number;
    return 0;
}

int bw_arg_flag(const char *name, PyObject *value, int *out) {
    if (!value) return 0;
    if (!PyBool_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: expected True or False; got %R", name, value);
        return -1;
    }
    *out = value == Py_True;
    return 0;
}

int bw_arg_float(const char *name, PyObject *value, double low, double high, double *out) {
    if (!value) return 0;
    double number = PyBool_Check(value) ? -1.0 : PyFloat_AsDouble(value);
    if (PyBool_Check(value) || (number == -1.0 && PyErr_Occurred())) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected a number; got %R", name, value);
        return -1;
    }
    if (!(number >= low && number <= high)) {
        PyObject *lowest = PyFloat_FromDouble(low), *highest = PyFloat_FromDouble(high);
        if (lowest && highest)
            PyErr_Format(PyExc_ValueError, "%s: expected %R .. %R; got %R", name, lowest, highest, value);
        Py_XDECREF(lowest);
        Py_XDECREF(highest);
        return -1;
    }
    *out = number;
    return 0;
}

int bw_arg_scheme(const char *name, PyObject *value, bw_scheme *out) {
    if (!PyTuple_Check(value) || PyTuple_Size(value) != 3) {
        PyErr_Format(PyExc_TypeError, "%s: expected (levels, group_size, symmetric); got %R", name, value);
        return -1;
    }
    int64_t levels = 0, group = 0;
    int symmetric = 0;
    if (bw_arg_int("levels", PyTuple_GetItem(value, 0), INT32_MIN, INT32_MAX, &levels) ||
        bw_arg_int("group_size", PyTuple_GetItem(value, 1), INT64_MIN, INT64_MAX, &group) ||
        bw_arg_flag("symmetric", PyTuple_GetItem(value, 2), &symmetric))
        return -1;
    bw_scheme scheme = {(int32_t)levels, symmetric, group};
    if (bw_check_scheme(&scheme)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected levels of 2, 3, 4, 8, 16, 32, 64, 256 and group_size of 16, 32, 64, 128, -1; got %R",
                     name, value);
        return -1;
    }
    *out = scheme;
    return 0;
}
