/* A sequence of parallel loops in one parallel region. */
#include "phases.h"

#include <sched.h>

#include "parallel.h"
#include "pause.h"

enum { SPINS = 2000 }; /* about 25 microseconds: far above what an even share of work leaves to wait for */

typedef struct {
    int n;
    bw_phase *phases;
    const bw_phase_fns *fns;
    void *context;
} phase_run;

static void wait_until_over(bw_phase *phase) {
    for (int spins = 0; !atomic_load_explicit(&phase->over, memory_order_acquire); spins++) {
        if (spins < SPINS) BW_PAUSE();
        else sched_yield(); /* whoever works on the last chunk may want this CPU */
    }
}

static void go_on(const phase_run *run, int p) {
    if (p + 1 < run->n) run->phases[p + 1].n = run->fns->begin(run->context, p + 1);
    else run->fns->end(run->context);
    atomic_store_explicit(&run->phases[p].over, 1, memory_order_release);
}

/* A thread that finds all loops over is done at once, so it does not matter who comes how often. */
static void join(void *context, ptrdiff_t member, int worker) {
    const phase_run *run = context;
    (void)member;
    for (int p = 0; p < run->n; p++) {
        bw_phase *phase = &run->phases[p];
        for (;;) {
            long long chunk = atomic_fetch_add_explicit(&phase->next, 1, memory_order_relaxed);
            if (chunk >= phase->n) break;
            run->fns->chunk(run->context, p, (ptrdiff_t)chunk, worker);
            if (atomic_fetch_add_explicit(&phase->done, 1, memory_order_acq_rel) == phase->n - 1) go_on(run, p);
        }
        wait_until_over(phase);
    }
}

bw_status bw_run_phases(int n_workers, int n, bw_phase *phases, const bw_phase_fns *fns, void *context) {
    phase_run run = {n, phases, fns, context};
    for (int p = 0; p < n; p++) {
        atomic_init(&phases[p].next, 0);
        atomic_init(&phases[p].done, 0);
        atomic_init(&phases[p].over, 0);
    }
    phases[0].n = fns->begin(context, 0);
    return bw_parallel_for(n_workers, n_workers, join, &run);
}
