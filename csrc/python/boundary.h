/* What every wrapper uses. The boundary computes nothing: it parses, borrows, calls the core once without the
 * GIL, translates the status and releases. Every wrapper keeps these five steps in this order and has one exit. */
#ifndef BW_BOUNDARY_H
#define BW_BOUNDARY_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL bw_array_api
#ifndef BW_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../core/bitween.h"
#include "dlpack.h"

/* ---- args.c ---- */
/* Spreads positional and keyword arguments over `values` in the order of the NULL-terminated `names`; a name after
 * "|" is optional and stays NULL when missing or None. Borrowed references. 0, or -1 with TypeError set. */
int bw_parse(const char *function, const char *const *names, PyObject *const *args, Py_ssize_t n_args,
             PyObject *keywords, PyObject **values);
/* Integers and flags; -1 with TypeError or ValueError naming the argument. NULL leaves the default alone. */
int bw_arg_int(const char *name, PyObject *value, int64_t low, int64_t high, int64_t *out);
int bw_arg_flag(const char *name, PyObject *value, int *out);
int bw_arg_float(const char *name, PyObject *value, double low, double high, double *out);
/* A tuple (levels, group_size, symmetric), checked. */
int bw_arg_scheme(const char *name, PyObject *value, bw_scheme *out);

/* ---- errors.c ---- */
/* Sets the exception for a status (not BW_OK) of the core verb `operation`; `argument` names the input at fault.
 * An exception already set stays. Returns NULL, for `return bw_raise(...)`. */
PyObject *bw_raise(const char *operation, const char *argument, bw_status status);

/* ---- gil.c ---- */
/* Around a call of the core. In between the calling thread asks for signals through bw_ask_signals, the function for
 * bw_on_interrupt; after BW_ERR_INTERRUPTED the handler's exception is set. */
void bw_release_gil(void);
void bw_take_gil(void);
int bw_ask_signals(void);

/* ---- tensor.c ---- */
enum { BW_MAX_DIMS = 8 };

/* A borrowed view of a CPU tensor. Zero-initialise it; releasing a zero view is legal. The memory stays
 * alive until bw_view_release. */
typedef struct {
    PyObject *capsule; /* renamed DLPack capsule; owns the managed tensor until release */
    void *managed;
    int versioned;
    char *data; /* byte_offset applied; NULL only when a dimension is 0 */
    int ndim;
    int64_t shape[BW_MAX_DIMS], strides[BW_MAX_DIMS]; /* elements */
    int code, bits;                                   /* DLPack type; lanes are 1 */
    int read_only;
} bw_view;

enum { BW_WRITABLE = 1, BW_CONTIGUOUS = 2 };

/* Views `object` (anything with __dlpack__). Refuses other devices, more than BW_MAX_DIMS dimensions, sizes that
 * overflow, and, by flags, memory that is read-only, or that is not contiguous and aligned to its elements.
 * -1 with an exception that names the argument. */
int bw_view_acquire(const char *name, PyObject *object, int flags, bw_view *view);
void bw_view_release(bw_view *view);
int64_t bw_view_size(const bw_view *view);
/* Checks on an acquired view; -1 with an exception that tells what came. `dtype` is "uint8", "float16", ... */
int bw_view_expect_ndim(const char *name, const bw_view *view, int ndim);
int bw_view_expect_dtype(const char *name, const bw_view *view, const char *dtype);
int bw_view_expect_shape(const char *name, const bw_view *view, int ndim, const int64_t *shape);
/* Refuses an output that shares memory with an input. */
int bw_view_expect_apart(const char *name, const bw_view *out, const char *input, const bw_view *view);
/* The view as a core matrix of floats: 2 dimensions, fp32 / fp16 / bf16. */
int bw_view_matrix(const char *name, const bw_view *view, bw_matrix *matrix);
/* Acquire + expect in one: a matrix of floats; a contiguous array of dtype and shape. */
int bw_view_float_matrix(const char *name, PyObject *object, bw_view *view, bw_matrix *matrix);
/* An importance of a (rows, cols) weight: of its shape, or (cols,) for all rows. */
int bw_view_importance(PyObject *object, const bw_matrix *weight, bw_view *view, bw_matrix *matrix);
int bw_view_array(const char *name, PyObject *object, const char *dtype, int ndim, const int64_t *shape, int flags,
                  bw_view *view);

/* ---- stored.c ---- */
/* The four arguments of a stored matrix as one core struct, views held beside it. */
typedef struct {
    bw_view codes, scales, zeros;
    bw_quantized tensor;
    bw_layout layout;
} bw_stored;

/* From Python objects (zeros NULL when symmetric), shapes checked against scheme and cols. */
int bw_stored_acquire(PyObject *codes, PyObject *scales, PyObject *zeros, PyObject *scheme, PyObject *cols,
                      bw_stored *stored);
void bw_stored_release(bw_stored *stored);
/* Refuses an output that shares memory with the stored matrix. */
int bw_stored_expect_apart(const char *name, const bw_view *out, const bw_stored *stored);
/* New NumPy arrays for a (rows, cols) matrix: a tuple (codes, scales, zeros or None) and the struct that points
 * into it. NULL with an exception. */
PyObject *bw_stored_new(ptrdiff_t rows, ptrdiff_t cols, const bw_scheme *scheme, bw_quantized *tensor);

/* ---- trellis.c ---- */
typedef struct {
    bw_view codes, scales, rates;
    bw_trellis tensor;
    bw_trellis_layout layout;
} bw_trellis_views;

/* From five Python objects: codes, scales, rates, width, cols. */
int bw_trellis_acquire(PyObject *const *v, bw_trellis_views *views);
void bw_trellis_release(bw_trellis_views *views);

/* ---- decoder_parts.c ---- */
/* A linear layer of a decoder with what keeps its memory alive. */
typedef struct {
    bw_stored stored;
    bw_trellis_views trellis;
    bw_view plain, bias;
} bw_linear_views;

/* A vector (n,) of floats as a matrix of one row. */
int bw_vector_acquire(const char *name, PyObject *object, bw_view *view, bw_matrix *matrix);
/* From a tuple: ("packed", codes, scales, zeros, scheme, cols, bias, mode), ("trellis", codes, scales, rates, width,
 * cols, bias, mode) or ("plain", weight, bias), or one of these and whether the bias is added late. */
int bw_linear_acquire(PyObject *layer, bw_linear_views *views, bw_linear *linear);
void bw_linear_release(bw_linear_views *views);
/* From None or a tuple (kind, eps, gain or None). */
int bw_norm_acquire(PyObject *norm, bw_view *view, bw_norm *out);
/* From None or a tuple (index of a layer, first row, rows). */
int bw_part_of(PyObject *part, const bw_linear *linears, Py_ssize_t n_linears, bw_part *out);
/* A tuple of n items, or -1 with TypeError. */
int bw_expect_tuple(const char *name, PyObject *object, Py_ssize_t n);
/* least <= n <= most, or -1 with ValueError. */
int bw_expect_range(const char *name, Py_ssize_t n, Py_ssize_t least, Py_ssize_t most);

/* Wrappers: one file per verb, listed once in verbs.h. */
#define VERB(name)                                                                                          \
    PyObject *bw_py_##name(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords); \
    extern const char bw_doc_##name[];
#include "verbs.h"
#undef VERB

#endif
