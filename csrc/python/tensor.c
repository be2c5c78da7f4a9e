/* Borrowing tensors over DLPack, without a copy and without knowing who made them.
 *
 * The protocol: obj.__dlpack__(max_version=(1, 0)) gives a capsule "dltensor_versioned" (or, from older
 * producers, "dltensor"). The consumer renames it "used_...", so that the capsule's own destructor leaves the
 * tensor alone, and calls the tensor's deleter exactly once. The rename comes first, before anything can fail.
 *
 * Types with a "__dlpack_c_exchange_api__" (PyTorch's) hand out the same managed tensor through a C function, about
 * ten times faster than a call of __dlpack__. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "boundary.h"

static const char *const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};

static const char *dtype_name(int code, int bits, char *buffer, size_t size) {
    if (code == 6 && bits == 8) snprintf(buffer, size, "bool");
    else if (code >= 0 && code < 7) snprintf(buffer, size, "%s%d", kinds[code], bits);
    else snprintf(buffer, size, "float%d (DLPack type %d)", bits, code); /* the fp8, fp6 and fp4 kinds */
    return buffer;
}

/* The capsule, by the newest form of the protocol that the producer knows. */
static PyObject *ask_capsule(PyObject *object) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__"), *capsule = NULL;
    if (!method) return NULL;
    PyObject *empty = PyTuple_New(0), *keywords = Py_BuildValue("{s:(ii)}", "max_version", 1, 0);
    if (empty && keywords) capsule = PyObject_Call(method, empty, keywords);
    if (empty && !capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); /* a producer from before versions */
        capsule = PyObject_Call(method, empty, NULL);
    }
    Py_XDECREF(keywords);
    Py_XDECREF(empty);
    Py_DECREF(method);
    return capsule;
}

/* The managed tensor from the type's own C function. 0 when there is none or it refuses: then __dlpack__ decides, also
 * on tensors that record gradients, which that function does not look at. */
static int ask_exchange(PyObject *object, bw_view *view) {
    static PyObject *attribute, *requires_grad;
    if (PyArray_Check(object)) return 0; /* has none, and a failed look-up is slow */
    if (!attribute) {
        requires_grad = PyUnicode_InternFromString("requires_grad");
        attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
        if (!requires_grad || !attribute) return 0;
    }
    PyObject *capsule = PyObject_GetAttr((PyObject *)Py_TYPE(object), attribute);
    DLPackExchangeAPIHeader *header = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    while (header && header->version.major != 1) header = header->prev_api;
    PyObject *records = header ? PyObject_GetAttr(object, requires_grad) : NULL;
    if (records == Py_True) header = NULL;
    Py_XDECREF(records);
    PyErr_Clear();
    DLManagedTensorVersioned *managed = NULL;
    if (header && !((DLPackExchangeAPI *)header)->managed_tensor_from_py_object_no_sync(object, &managed)) {
        view->managed = managed;
        view->versioned = 1;
    }
    Py_XDECREF(capsule);
    PyErr_Clear();
    return view->managed != NULL;
}

static void call_deleter(bw_view *view) {
    if (!view->managed) return;
    if (view->versioned) {
        DLManagedTensorVersioned *m = view->managed;
        if (m->deleter) m->deleter(m);
    } else {
        DLManagedTensor *m = view->managed;
        if (m->deleter) m->deleter(m);
    }
    view->managed = NULL;
}

/* The producer's deleter may run Python code, which must not see the exception that is on its way. */
void bw_view_release(bw_view *view) {
    PyObject *type, *value, *traceback;
    if (!view->capsule && !view->managed) return;
    PyErr_Fetch(&type, &value, &traceback);
    call_deleter(view);
    Py_CLEAR(view->capsule);
    if (PyErr_Occurred()) PyErr_WriteUnraisable(NULL);
    PyErr_Restore(type, value, traceback);
}

/* Takes the tensor out of the capsule; after this view->managed must be released. */
static int take_tensor(const char *name, bw_view *view) {
    const char *kind = PyCapsule_IsValid(view->capsule, "dltensor_versioned") ? "dltensor_versioned" : "dltensor";
    void *managed = PyCapsule_GetPointer(view->capsule, kind);
    if (!managed) {
        PyErr_Clear();
        PyErr_Format(PyExc_BufferError, "%s: expected an unused DLPack capsule; got %R", name, view->capsule);
        return -1;
    }
    view->versioned = kind[8] != 0;
    if (PyCapsule_SetName(view->capsule, view->versioned ? "used_dltensor_versioned" : "used_dltensor")) return -1;
    view->managed = managed;
    if (view->versioned && ((DLManagedTensorVersioned *)managed)->version.major != 1) {
        PyErr_Format(PyExc_BufferError, "%s: expected DLPack version 1; got %u", name,
                     (unsigned)((DLManagedTensorVersioned *)managed)->version.major);
        return -1;
    }
    return 0;
}

/* size *= n and reach += |stride| * (n - 1), or -1 when one does not fit. */
static int extend(int64_t n, int64_t stride, int64_t *size, int64_t *reach) {
    int64_t span;
    if (__builtin_mul_overflow(*size, n, size) || __builtin_mul_overflow(stride, n - 1, &span)) return -1;
    if (span < 0 && __builtin_sub_overflow((int64_t)0, span, &span)) return -1;
    return __builtin_add_overflow(*reach, span, reach) ? -1 : 0;
}

/* Shape and strides, with no product that can overflow later on. A dimension of one element leads nowhere, so its
 * stride, which may be anything, is replaced by the row-major one; an empty tensor has strides 0. */
static int read_shape(const char *name, const DLTensor *t, bw_view *view) {
    if (t->ndim < 0 || t->ndim > BW_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: expected at most %d dimensions; got %d", name, BW_MAX_DIMS, (int)t->ndim);
        return -1;
    }
    if (t->ndim && !t->shape) {
        PyErr_Format(PyExc_ValueError, "%s: expected a shape; got a null pointer", name);
        return -1;
    }
    int64_t size = 1, reach = 0, width = view->bits > 8 ? view->bits / 8 : 1, n_bytes;
    int fits = 1, empty = 0;
    view->ndim = t->ndim;
    for (int i = 0; i < t->ndim; i++) {
        view->shape[i] = t->shape[i];
        fits &= t->shape[i] >= 0;
        empty |= t->shape[i] == 0;
    }
    for (int i = t->ndim - 1; i >= 0 && fits && !empty; i--) {
        view->strides[i] = t->strides && t->shape[i] != 1 ? t->strides[i] : size;
        fits = !extend(t->shape[i], view->strides[i], &size, &reach);
    }
    if (!fits || __builtin_mul_overflow(reach, width, &n_bytes) || __builtin_mul_overflow(size, (int64_t)8, &n_bytes)) {
        PyErr_Format(PyExc_ValueError, "%s: expected sizes and strides that fit in memory; got others", name);
        return -1;
    }
    return 0;
}

static int is_contiguous(const bw_view *view) {
    int64_t expected = 1;
    if (!bw_view_size(view)) return 1;
    for (int i = view->ndim - 1; i >= 0; i--) {
        if (view->shape[i] != 1 && view->strides[i] != expected) return 0;
        expected *= view->shape[i];
    }
    return 1;
}

static int read_tensor(const char *name, int flags, bw_view *view) {
    const DLManagedTensorVersioned *versioned = view->managed;
    const DLTensor *t = view->versioned ? &versioned->dl_tensor : &((DLManagedTensor *)view->managed)->dl_tensor;
    view->read_only = view->versioned && (versioned->flags & DLPACK_FLAG_BITMASK_READ_ONLY);
    if (t->device.device_type != kDLCPU) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tensor on the CPU; got DLPack device type %d (call .cpu() first)",
                     name, (int)t->device.device_type);
        return -1;
    }
    view->code = t->dtype.code;
    view->bits = t->dtype.bits;
    if (t->dtype.lanes != 1) {
        PyErr_Format(PyExc_TypeError, "%s: expected single elements; got vectors of %d", name, (int)t->dtype.lanes);
        return -1;
    }
    if (read_shape(name, t, view)) return -1;
    if (!t->data && bw_view_size(view)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a tensor with memory behind it; got a null pointer", name);
        return -1;
    }
    view->data = t->data ? (char *)((uintptr_t)t->data + (uintptr_t)t->byte_offset) : NULL;
    if ((flags & BW_WRITABLE) && view->read_only) {
        PyErr_Format(PyExc_ValueError, "%s: expected writable memory; got a read-only tensor", name);
        return -1;
    }
    if ((flags & BW_CONTIGUOUS) && !is_contiguous(view)) {
        PyErr_Format(PyExc_ValueError, "%s: expected contiguous memory; got a strided tensor (call .contiguous())",
                     name);
        return -1;
    }
    if ((flags & BW_CONTIGUOUS) && view->bits >= 8 && (uintptr_t)view->data % (uintptr_t)(view->bits / 8)) {
        PyErr_Format(PyExc_ValueError, "%s: expected aligned memory; got an address between elements", name);
        return -1;
    }
    return 0;
}

int bw_view_acquire(const char *name, PyObject *object, int flags, bw_view *view) {
    memset(view, 0, sizeof *view);
    if (ask_exchange(object, view)) {
        if (!read_tensor(name, flags, view)) return 0;
        bw_view_release(view);
        return -1;
    }
    if (!PyObject_HasAttrString(object, "__dlpack__")) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tensor with __dlpack__ (torch, NumPy, ...); got %R", name,
                     (PyObject *)Py_TYPE(object));
        return -1;
    }
    view->capsule = ask_capsule(object);
    if (view->capsule && !take_tensor(name, view) && !read_tensor(name, flags, view)) return 0;
    bw_view_release(view);
    return -1;
}

int64_t bw_view_size(const bw_view *view) {
    int64_t size = 1;
    for (int i = 0; i < view->ndim; i++)
        if (view->shape[i] == 0) return 0;
    for (int i = 0; i < view->ndim; i++) size *= view->shape[i];
    return size;
}

/* First byte and the byte past the last; both 0 when there is none. */
static void span_of(const bw_view *view, intptr_t *first, intptr_t *end) {
    intptr_t width = view->bits > 8 ? view->bits / 8 : 1;
    *first = *end = 0;
    if (!view->data || !bw_view_size(view)) return;
    *first = (intptr_t)view->data;
    *end = *first + width;
    for (int i = 0; i < view->ndim; i++) {
        intptr_t span = (intptr_t)(view->strides[i] * (view->shape[i] - 1)) * width;
        if (span < 0) *first += span;
        else *end += span;
    }
}

int bw_view_expect_apart(const char *name, const bw_view *out, const char *input, const bw_view *view) {
    intptr_t out_first, out_end, first, end;
    span_of(out, &out_first, &out_end);
    span_of(view, &first, &end);
    if (out_end <= first || end <= out_first) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected memory of its own; it overlaps %s", name, input);
    return -1;
}

static PyObject *shape_tuple(int ndim, const int64_t *shape) {
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple && i < ndim; i++) {
        PyObject *number = PyLong_FromLongLong(shape[i]);
        if (!number || PyTuple_SetItem(tuple, i, number)) Py_CLEAR(tuple);
    }
    return tuple;
}

int bw_view_expect_ndim(const char *name, const bw_view *view, int ndim) {
    if (view->ndim == ndim) return 0;
    PyObject *got = shape_tuple(view->ndim, view->shape);
    if (got) PyErr_Format(PyExc_ValueError, "%s: expected %d dimensions; got shape %R", name, ndim, got);
    Py_XDECREF(got);
    return -1;
}

static int has_dtype(const bw_view *view, const char *dtype) {
    if (view->code < 0 || view->code > 6) return 0;
    size_t n = strlen(kinds[view->code]);
    return !strncmp(dtype, kinds[view->code], n) && atoi(dtype + n) == view->bits;
}

int bw_view_expect_dtype(const char *name, const bw_view *view, const char *dtype) {
    char buffer[48];
    if (has_dtype(view, dtype)) return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected dtype %s; got %s", name, dtype,
                 dtype_name(view->code, view->bits, buffer, sizeof buffer));
    return -1;
}

int bw_view_expect_shape(const char *name, const bw_view *view, int ndim, const int64_t *shape) {
    if (bw_view_expect_ndim(name, view, ndim)) return -1;
    if (!memcmp(view->shape, shape, (size_t)ndim * sizeof *shape)) return 0;
    PyObject *expected = shape_tuple(ndim, shape), *got = shape_tuple(ndim, view->shape);
    if (expected && got) PyErr_Format(PyExc_ValueError, "%s: expected shape %R; got %R", name, expected, got);
    Py_XDECREF(expected);
    Py_XDECREF(got);
    return -1;
}

int bw_view_matrix(const char *name, const bw_view *view, bw_matrix *matrix) {
    char buffer[48];
    static const char *const known[] = {"float32", "float16", "bfloat16"};
    int found = -1;
    for (int i = 0; i < 3; i++)
        if (has_dtype(view, known[i])) found = i;
    if (found < 0) {
        PyErr_Format(PyExc_TypeError, "%s: expected dtype float32, float16 or bfloat16; got %s", name,
                     dtype_name(view->code, view->bits, buffer, sizeof buffer));
        return -1;
    }
    if (bw_view_expect_ndim(name, view, 2)) return -1;
    *matrix = (bw_matrix){view->data,
                          (ptrdiff_t)view->shape[0],
                          (ptrdiff_t)view->shape[1],
                          (ptrdiff_t)view->strides[0],
                          (ptrdiff_t)view->strides[1],
                          (bw_dtype)found};
    bw_status status = bw_check_matrix(matrix);
    if (status) bw_raise("a matrix", name, status);
    return status ? -1 : 0;
}

int bw_view_float_matrix(const char *name, PyObject *object, bw_view *view, bw_matrix *matrix) {
    if (bw_view_acquire(name, object, 0, view)) return -1;
    return bw_view_matrix(name, view, matrix);
}

int bw_view_importance(PyObject *object, const bw_matrix *weight, bw_view *view, bw_matrix *matrix) {
    const char *name = "importance";
    if (bw_view_acquire(name, object, 0, view)) return -1;
    if (view->ndim == 1) { /* one row for all: a row stride of 0 */
        view->ndim = 2;
        view->shape[1] = view->shape[0];
        view->strides[1] = view->strides[0];
        view->shape[0] = weight->rows;
        view->strides[0] = 0;
    }
    const int64_t shape[2] = {weight->rows, weight->cols};
    return bw_view_matrix(name, view, matrix) || bw_view_expect_shape(name, view, 2, shape) ? -1 : 0;
}

int bw_view_array(const char *name, PyObject *object, const char *dtype, int ndim, const int64_t *shape, int flags,
                  bw_view *view) {
    if (bw_view_acquire(name, object, flags | BW_CONTIGUOUS, view)) return -1;
    if (bw_view_expect_dtype(name, view, dtype)) return -1;
    return bw_view_expect_shape(name, view, ndim, shape);
}
