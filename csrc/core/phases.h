/* A sequence of parallel loops in one parallel region: threads are woken once and meet between the loops.
 *
 * A loop ends when all its chunks are done, not when all threads have arrived: one that comes late, or never, holds up
 * nobody. Whichever thread ends a loop's last chunk begins the next one, alone. */
#ifndef BW_PHASES_H
#define BW_PHASES_H

#include <stdatomic.h>

#include "bitween.h"

typedef struct {
    _Alignas(64) atomic_llong next; /* chunk to be taken */
    atomic_llong done;              /* chunks that are */
    long long n;
    atomic_int over; /* all are done, and the next loop has begun */
} bw_phase;

typedef struct {
    /* What is to be done between two loops, by one thread; returns the chunks of loop `phase`, at least 1. */
    ptrdiff_t (*begin)(void *context, int phase);
    void (*chunk)(void *context, int phase, ptrdiff_t chunk, int worker);
    void (*end)(void *context); /* after the last loop */
} bw_phase_fns;

/* `phases`: n >= 1 of them, for the function's own use. BW_ERR_INTERRUPTED when that was asked for; all loops have been
 * run even so. */
bw_status bw_run_phases(int n_workers, int n, bw_phase *phases, const bw_phase_fns *fns, void *context);

#endif
