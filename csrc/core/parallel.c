/* The thread pool: started at first use, sized by bw_set_num_threads, rebuilt after fork.
 *
 * Own pthreads instead of OpenMP, because PyTorch brings an OpenMP runtime of its own and two of them in one
 * process would fight. Idle workers spin for a moment, since products follow each other closely
 * while a model generates, then sleep on a condition variable. */
#include "parallel.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "blas.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define BW_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define BW_PAUSE() __asm__ volatile("yield")
#else
#define BW_PAUSE() ((void)0)
#endif

#define BW_MAX_THREADS 1024
#define BW_SPINS 4000 /* about 50 microseconds: longer than the gap between two products of a model */

typedef struct {
    bw_chunk_fn fn;
    void *context;
    ptrdiff_t n_chunks;
    int n_workers;
} bw_job;

static struct {
    pthread_mutex_t owner; /* held by the thread whose loop is running */
    pthread_mutex_t lock;  /* guards the fields below it */
    pthread_cond_t wake;
    pthread_t threads[BW_MAX_THREADS];
    int n_started; /* workers running, the caller not counted */
    bw_job job;
    atomic_ullong generation; /* grows by one with each job */
    atomic_llong next_chunk;
    atomic_int n_busy;
    atomic_int n_threads;
    int fork_handler;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .n_threads = 1};

bw_status bw_set_num_threads(int n) {
    if (n < 1 || n > BW_MAX_THREADS) return BW_ERR_ARGUMENT;
    atomic_store(&pool.n_threads, n);
    return BW_OK;
}

int bw_get_num_threads(void) {
    return atomic_load(&pool.n_threads);
}

int bw_n_workers(ptrdiff_t n_chunks) {
    int n = bw_get_num_threads();
    return n_chunks < n ? (n_chunks < 1 ? 1 : (int)n_chunks) : n;
}

static void run_chunks(const bw_job *job, int worker) {
    for (;;) {
        long long chunk = atomic_fetch_add_explicit(&pool.next_chunk, 1, memory_order_relaxed);
        if (chunk >= job->n_chunks) return;
        job->fn(job->context, (ptrdiff_t)chunk, worker);
    }
}

/* Waits for a job newer than `seen`; spins first, sleeps then. */
static unsigned long long wait_for_job(unsigned long long seen) {
    for (int i = 0; i < BW_SPINS; i++) {
        if (atomic_load_explicit(&pool.generation, memory_order_acquire) != seen) break;
        BW_PAUSE();
    }
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    return atomic_load(&pool.generation);
}

typedef struct {
    int worker;
    unsigned long long seen;
} bw_start;

static bw_start starts[BW_MAX_THREADS];

static void *worker_main(void *arg) {
    bw_start start = *(bw_start *)arg;
    unsigned long long seen = start.seen;
    bw_blas_prepare_thread();
    for (;;) {
        seen = wait_for_job(seen);
        /* The owner waits for every started worker, so the job stands still while it is read. */
        if (start.worker < pool.job.n_workers) run_chunks(&pool.job, start.worker);
        atomic_fetch_sub_explicit(&pool.n_busy, 1, memory_order_release);
    }
    return NULL;
}

/* Threads do not survive fork: the child starts with an empty pool and fresh locks. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.n_started = 0;
    atomic_store(&pool.n_busy, 0);
}

/* Starts workers up to n - 1; fewer run when the system has no more threads to give. They are born with signals
 * blocked, so that Ctrl-C reaches a thread that answers to it. */
static void start_workers(int n) {
    if (!pool.fork_handler) {
        pthread_atfork(NULL, NULL, after_fork_in_child);
        pool.fork_handler = 1;
    }
    if (pool.n_started >= n - 1) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (pool.n_started < n - 1) {
        int worker = pool.n_started + 1;
        starts[worker].worker = worker;
        starts[worker].seen = atomic_load(&pool.generation);
        if (pthread_create(&pool.threads[worker], NULL, worker_main, &starts[worker])) break;
        pthread_detach(pool.threads[worker]);
        pool.n_started = worker;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void run_alone(ptrdiff_t n_chunks, bw_chunk_fn fn, void *context) {
    for (ptrdiff_t i = 0; i < n_chunks; i++) fn(context, i, 0);
}

void bw_parallel_for(int n_workers, ptrdiff_t n_chunks, bw_chunk_fn fn, void *context) {
    /* The lock is taken whenever a loop runs, so a call from inside a chunk, on whatever thread, finds it taken. */
    if (n_workers < 2 || n_chunks < 2 || pthread_mutex_trylock(&pool.owner)) {
        run_alone(n_chunks, fn, context);
        return;
    }
    start_workers(n_workers);
    pthread_mutex_lock(&pool.lock);
    pool.job = (bw_job){fn, context, n_chunks, n_workers};
    atomic_store(&pool.next_chunk, 0);
    atomic_store(&pool.n_busy, pool.n_started);
    atomic_fetch_add_explicit(&pool.generation, 1, memory_order_release);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    run_chunks(&pool.job, 0);
    for (int spins = 0; atomic_load_explicit(&pool.n_busy, memory_order_acquire) > 0; spins++) {
        if (spins < BW_SPINS) BW_PAUSE();
        else usleep(20);
    }
    pthread_mutex_unlock(&pool.owner);
}
