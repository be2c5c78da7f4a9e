/* The one place where a status of the core becomes a Python exception. */
#include "boundary.h"

PyObject *bw_raise(const char *operation, const char *argument, bw_status status) {
    if (PyErr_Occurred()) return NULL;
    switch (status) {
    case BW_OK: PyErr_Format(PyExc_SystemError, "%s: raised without an error", operation); break;
    case BW_ERR_ARGUMENT: PyErr_Format(PyExc_ValueError, "%s: value not accepted by %s", argument, operation); break;
    case BW_ERR_SHAPE:
        PyErr_Format(PyExc_ValueError, "%s: shapes given to %s do not fit together", argument, operation);
        break;
    case BW_ERR_OVERFLOW:
        PyErr_Format(PyExc_ValueError, "%s: size beyond the address range in %s", argument, operation);
        break;
    case BW_ERR_NONFINITE:
        PyErr_Format(PyExc_ValueError, "%s: expected finite values; got NaN or infinity in %s", argument, operation);
        break;
    case BW_ERR_RANGE:
        PyErr_Format(PyExc_ValueError,
                     "%s: expected groups whose step between levels is at most 65504, the largest fp16 scale; "
                     "got a wider range in %s",
                     argument, operation);
        break;
    case BW_ERR_MEMORY:
        PyErr_Format(PyExc_MemoryError, "%s: not enough memory to work on %s", operation, argument);
        break;
    case BW_ERR_FACTOR:
        PyErr_Format(PyExc_ValueError, "%s: expected a positive matrix; its factorisation failed in %s", argument,
                     operation);
        break;
    case BW_ERR_CODE:
        PyErr_Format(PyExc_ValueError, "%s: expected codes within the scheme; got a larger one in %s", argument,
                     operation);
        break;
    case BW_ERR_INDEX:
        PyErr_Format(PyExc_IndexError, "%s: expected indices of rows or classes that exist; got another in %s",
                     argument, operation);
        break;
    case BW_ERR_SCALE:
        PyErr_Format(PyExc_ValueError, "scales: expected finite values > 0; got another in %s", operation);
        break;
    case BW_ERR_IMPORTANCE:
        PyErr_Format(PyExc_ValueError,
                     "importance: expected finite values >= 0; got a negative value, NaN or infinity "
                     "in %s",
                     operation);
        break;
    case BW_ERR_INTERRUPTED: PyErr_SetNone(PyExc_KeyboardInterrupt); break;
    case BW_ERR_HESSIAN:
        PyErr_Format(PyExc_ValueError,
                     "%s: expected a finite, symmetric matrix with a diagonal >= 0; got another in %s", argument,
                     operation);
        break;
    }
    return NULL;
}
