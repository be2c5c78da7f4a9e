/* The GIL around a call of the core, and Ctrl-C inside one: the thread that called asks Python for signals between two
 * chunks of work. */
#include <time.h>

#include "boundary.h"

enum { NANOSECONDS_BETWEEN = 50 * 1000 * 1000 }; /* far below what a person waits, far above what asking takes */

static _Thread_local PyThreadState *released; /* NULL outside of a call, and always on the core's own threads */
static _Thread_local int64_t asked;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void bw_release_gil(void) {
    asked = now();
    released = PyEval_SaveThread();
}

void bw_take_gil(void) {
    PyThreadState *state = released;
    released = NULL;
    PyEval_RestoreThread(state);
}

int bw_ask_signals(void) {
    if (!released || now() - asked < NANOSECONDS_BETWEEN) return 0;
    bw_take_gil();
    int stop = PyErr_CheckSignals(); /* a handler may well call the core itself */
    bw_release_gil();
    return stop;
}
