/* The only file that names OpenBLAS. Row-major callers, column-major LAPACK: an upper triangle seen row by row
 * is a lower one seen column by column. */
#include "blas.h"

#include <limits.h>
#include <pthread.h>

#ifdef BW_BLAS_SCIPY /* the library that setup.py copies into the package, symbols prefixed */
#define BLAS(name) scipy_##name
#else
#define BLAS(name) name
#endif

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112, UPPER = 121 };

void BLAS(cblas_sgemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                       int);
void BLAS(cblas_ssyrk)(int, int, int, int, int, float, const float *, int, float, float *, int);
void BLAS(dpotrf_)(const char *, const int *, double *, const int *, int *, size_t);
void BLAS(dpotrs_)(const char *, const int *, const int *, const double *, const int *, double *, const int *, int *,
                   size_t);
char *BLAS(openblas_get_config)(void);
char *BLAS(openblas_get_corename)(void);
void BLAS(openblas_set_num_threads)(int);

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void single_threaded(void) {
    BLAS(openblas_set_num_threads)(1);
}

void bw_sgemm(int transpose_a, int transpose_b, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, float alpha, const float *a,
              ptrdiff_t lda, const float *b, ptrdiff_t ldb, float beta, float *c, ptrdiff_t ldc) {
    pthread_once(&once, single_threaded);
    BLAS(cblas_sgemm)(ROW_MAJOR, transpose_a ? TRANS : NO_TRANS, transpose_b ? TRANS : NO_TRANS, (int)m, (int)n, (int)k,
                      alpha, a, (int)lda, b, (int)ldb, beta, c, (int)ldc);
}

void bw_ssyrk(ptrdiff_t n, ptrdiff_t k, float alpha, const float *a, ptrdiff_t lda, float beta, float *c,
              ptrdiff_t ldc) {
    pthread_once(&once, single_threaded);
    BLAS(cblas_ssyrk)(ROW_MAJOR, UPPER, TRANS, (int)n, (int)k, alpha, a, (int)lda, beta, c, (int)ldc);
}

void bw_blas_prepare_thread(void) {
    const float one = 1;
    float square = 0;
    bw_ssyrk(1, 1, 1, &one, 1, 0, &square, 1);
}

static bw_status translate(int info) {
    return info == 0 ? BW_OK : info > 0 ? BW_ERR_FACTOR : BW_ERR_ARGUMENT;
}

bw_status bw_dpotrf_upper(ptrdiff_t n, double *a, ptrdiff_t lda) {
    pthread_once(&once, single_threaded);
    if (n > INT_MAX || lda > INT_MAX) return BW_ERR_OVERFLOW;
    int size = (int)n, stride = (int)lda, info = 0;
    BLAS(dpotrf_)("L", &size, a, &stride, &info, 1);
    return translate(info);
}

bw_status bw_dpotrs_upper(ptrdiff_t n, ptrdiff_t m, const double *a, ptrdiff_t lda, double *b, ptrdiff_t ldb) {
    pthread_once(&once, single_threaded);
    if (n > INT_MAX || m > INT_MAX || lda > INT_MAX || ldb > INT_MAX) return BW_ERR_OVERFLOW;
    int size = (int)n, count = (int)m, stride = (int)lda, b_stride = (int)ldb, info = 0;
    BLAS(dpotrs_)("L", &size, &count, a, &stride, b, &b_stride, &info, 1);
    return translate(info);
}

const char *bw_blas_name(void) {
    return BLAS(openblas_get_config)();
}

const char *bw_blas_core(void) {
    return BLAS(openblas_get_corename)();
}
