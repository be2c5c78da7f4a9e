/* The thread pool: started at first use, sized by bw_set_num_threads, rebuilt after fork.
 *
 * Where PyTorch's OpenMP threads can be borrowed (openmp.c) they do the work, because two pools in one process would
 * fight. Elsewhere it is done by own pthreads. Idle workers spin for a moment, since products follow each other closely
 * while a model generates, then sleep, each on a condition variable of its own. The caller works too, and takes back
 * what a worker has not begun by the end: a worker that wakes late costs nothing. */
#include "parallel.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "blas.h"
#include "openmp.h"
#include "pause.h"

#define BW_MAX_THREADS 1024
#define BW_SPINS 4000 /* about 50 microseconds: longer than the gap between two products of a model */

typedef struct {
    bw_chunk_fn fn;
    void *context;
    ptrdiff_t n_chunks;
} bw_job;

enum { IDLE, POSTED, RUNNING };

typedef struct {
    _Alignas(64) atomic_int state; /* the owner posts, the worker runs and goes idle, or the owner takes it back */
    atomic_int sleeping;
    int index;
    pthread_mutex_t lock; /* with `wake`, for sleeping only */
    pthread_cond_t wake;
} bw_worker;

static bw_worker workers[BW_MAX_THREADS]; /* 0 is the caller and never used */

static struct {
    pthread_mutex_t owner; /* held by the thread whose loop is running; guards the fields up to next_chunk */
    int n_started;         /* workers running, the caller not counted */
    int fork_handler;
    bw_job job;
    int n_workers; /* on borrowed threads */
    atomic_llong next_chunk;
    atomic_int next_worker;
    atomic_int interrupted;
    atomic_int n_threads;
    _Atomic(bw_interrupt_fn) ask;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .n_threads = 1};

bw_status bw_set_num_threads(int n) {
    if (n < 1 || n > BW_MAX_THREADS) return BW_ERR_ARGUMENT;
    atomic_store(&pool.n_threads, n);
    return BW_OK;
}

int bw_borrow_threads(void) {
    return bw_openmp_find();
}

int bw_get_num_threads(void) {
    return atomic_load(&pool.n_threads);
}

int bw_n_workers(ptrdiff_t n_chunks) {
    int n = bw_get_num_threads();
    return n_chunks < n ? (n_chunks < 1 ? 1 : (int)n_chunks) : n;
}

void bw_on_interrupt(bw_interrupt_fn ask) {
    atomic_store(&pool.ask, ask);
}

static int interrupted(void) {
    bw_interrupt_fn ask = atomic_load_explicit(&pool.ask, memory_order_relaxed);
    return ask && ask();
}

static void run_chunks(const bw_job *job, int worker) {
    for (;;) {
        long long chunk = atomic_fetch_add_explicit(&pool.next_chunk, 1, memory_order_relaxed);
        if (chunk >= job->n_chunks || atomic_load_explicit(&pool.interrupted, memory_order_relaxed)) return;
        job->fn(job->context, (ptrdiff_t)chunk, worker);
        if (interrupted()) atomic_store_explicit(&pool.interrupted, 1, memory_order_relaxed);
    }
}

static void run_borrowed(void *context) {
    static _Thread_local int prepared;
    (void)context;
    int worker = atomic_fetch_add_explicit(&pool.next_worker, 1, memory_order_relaxed);
    if (worker >= pool.n_workers) return;
    if (!prepared) {
        bw_blas_prepare_thread();
        prepared = 1;
    }
    run_chunks(&pool.job, worker);
}

static void wait_for_post(bw_worker *w) {
    for (int i = 0; i < BW_SPINS; i++) {
        if (atomic_load_explicit(&w->state, memory_order_relaxed) == POSTED) return;
        BW_PAUSE();
    }
    pthread_mutex_lock(&w->lock);
    /* Either the owner sees that the worker sleeps, or the worker sees the post: both are sequentially consistent. */
    atomic_store(&w->sleeping, 1);
    while (atomic_load(&w->state) != POSTED) pthread_cond_wait(&w->wake, &w->lock);
    atomic_store(&w->sleeping, 0);
    pthread_mutex_unlock(&w->lock);
}

static void *worker_main(void *arg) {
    bw_worker *w = arg;
    bw_blas_prepare_thread();
    for (;;) {
        wait_for_post(w);
        int posted = POSTED;
        if (!atomic_compare_exchange_strong(&w->state, &posted, RUNNING)) continue;
        run_chunks(&pool.job, w->index);
        atomic_store_explicit(&w->state, IDLE, memory_order_release);
    }
    return NULL;
}

static void post(bw_worker *w) {
    atomic_store(&w->state, POSTED);
    if (!atomic_load(&w->sleeping)) return;
    pthread_mutex_lock(&w->lock);
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
}

/* Takes the job back from a worker that has not begun, or waits for one that has. */
static void finish(bw_worker *w) {
    int posted = POSTED;
    if (atomic_compare_exchange_strong(&w->state, &posted, IDLE)) return;
    for (int spins = 0; atomic_load_explicit(&w->state, memory_order_acquire) != IDLE; spins++) {
        if (spins < BW_SPINS) BW_PAUSE();
        else usleep(20);
    }
}

/* Threads do not survive fork: the child starts with an empty pool. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pool.n_started = 0;
}

static int start_worker(int index) {
    bw_worker *w = &workers[index];
    pthread_t thread;
    w->index = index;
    atomic_store(&w->state, IDLE);
    atomic_store(&w->sleeping, 0);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, NULL);
    if (pthread_create(&thread, NULL, worker_main, w)) return -1;
    pthread_detach(thread);
    return 0;
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
    while (pool.n_started < n - 1 && !start_worker(pool.n_started + 1)) pool.n_started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static bw_status run_alone(ptrdiff_t n_chunks, bw_chunk_fn fn, void *context) {
    for (ptrdiff_t i = 0; i < n_chunks; i++) {
        fn(context, i, 0);
        if (interrupted()) return BW_ERR_INTERRUPTED;
    }
    return BW_OK;
}

static void run_on_own_threads(int n_workers) {
    start_workers(n_workers);
    if (n_workers > pool.n_started + 1) n_workers = pool.n_started + 1;
    for (int i = 1; i < n_workers; i++) post(&workers[i]);
    run_chunks(&pool.job, 0);
    for (int i = 1; i < n_workers; i++) finish(&workers[i]);
}

bw_status bw_parallel_for(int n_workers, ptrdiff_t n_chunks, bw_chunk_fn fn, void *context) {
    /* The lock is taken whenever a loop runs, so a call from inside a chunk, on whatever thread, finds it taken. */
    if (n_workers < 2 || n_chunks < 2 || pthread_mutex_trylock(&pool.owner)) return run_alone(n_chunks, fn, context);
    pool.job = (bw_job){fn, context, n_chunks};
    pool.n_workers = n_workers;
    atomic_store(&pool.next_chunk, 0);
    atomic_store(&pool.next_worker, 0);
    atomic_store(&pool.interrupted, 0);
    /* Always as many as there are: a smaller team would end the threads that it leaves out. */
    if (!bw_openmp_run(bw_get_num_threads(), run_borrowed, NULL)) run_on_own_threads(n_workers);
    bw_status status = atomic_load(&pool.interrupted) ? BW_ERR_INTERRUPTED : BW_OK;
    pthread_mutex_unlock(&pool.owner);
    return status;
}
