/* A parallel loop over chunks.
 *
 * The caller fixes the chunks, so the work in each, and every sum inside it, is the same whatever the
 * number of threads. `worker` is below the n_workers passed and is used to pick scratch memory. A call from inside
 * a chunk, or while another thread's loop is running, runs on the calling thread alone.
 *
 * BW_ERR_INTERRUPTED when bw_on_interrupt's function said so: chunks that had not begun are left out. */
#ifndef BW_PARALLEL_H
#define BW_PARALLEL_H

#include "bitween.h"

typedef void (*bw_chunk_fn)(void *context, ptrdiff_t chunk, int worker);

/* Workers that a loop of n_chunks may use now: min(threads, n_chunks), at least 1. */
int bw_n_workers(ptrdiff_t n_chunks);
bw_status bw_parallel_for(int n_workers, ptrdiff_t n_chunks, bw_chunk_fn fn, void *context);

#endif
