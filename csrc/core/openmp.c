/* Borrowing PyTorch's threads. Its OpenMP workers spin after every region, so a second pool would share the CPUs with
 * them exactly while a model runs; on their own threads our loops cost no more than PyTorch's. GOMP_parallel is what
 * gcc calls for `#pragma omp parallel`, and has been the same since gcc 4.9. */
#include "openmp.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

typedef void (*parallel_fn)(void (*fn)(void *), void *context, unsigned n_threads, unsigned flags);

static _Atomic(parallel_fn) parallel;
static atomic_int handler;

static void after_fork_in_child(void) {
    atomic_store(&parallel, (parallel_fn)NULL);
    atomic_store(&handler, -1);
}

int bw_openmp_find(void) {
    if (atomic_load(&parallel)) return 1;
    if (atomic_load(&handler) < 0) return 0;
    void *library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_NOLOAD);
    parallel_fn found = library ? (parallel_fn)dlsym(library, "GOMP_parallel") : NULL;
    if (!found) return 0;
    int none = 0;
    if (atomic_compare_exchange_strong(&handler, &none, 1)) pthread_atfork(NULL, NULL, after_fork_in_child);
    atomic_store(&parallel, found);
    return 1;
}

int bw_openmp_run(int n, void (*fn)(void *), void *context) {
    parallel_fn run = atomic_load_explicit(&parallel, memory_order_relaxed);
    if (!run) return 0;
    run(fn, context, (unsigned)n, 0);
    return 1;
}
