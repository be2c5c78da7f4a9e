/* The frame of every row-wise quantizer: rows in parallel, each with scratch of its own.
 * A verb supplies only the step that finds a row's scales and zeros. */
#ifndef BW_ROWS_H
#define BW_ROWS_H

#include "bitween.h"
#include "cpu.h"
#include "pack.h"

/* One row at work. Arrays are scratch of the worker, but for values that can be read where they are. */
typedef struct {
    ptrdiff_t index;
    const float *values; /* cols */
    float *importance;   /* cols; NULL when the job has none */
    float *zeros;        /* n_groups, as numbers */
    uint16_t *scales;    /* n_groups */
    uint8_t *bytes;      /* max(cols, n_groups) + 8: unpacked codes or zeros */
} bw_row;

typedef struct bw_row_job bw_row_job;
/* Fills row->scales and row->zeros from row->values. */
typedef bw_status (*bw_grid_fn)(const bw_row_job *job, bw_row *row);

struct bw_row_job {
    const bw_matrix *weight;
    const bw_matrix *importance; /* NULL, or of weight's shape */
    const bw_quantized *out;
    bw_layout layout;
    bw_grid_fn find_grid;
    void *context; /* the verb's own */
};

/* Checks shapes, then runs every row: load, find_grid, encode, pack. Importance may be NULL. */
bw_status bw_quantize_rows(const bw_matrix *weight, const bw_matrix *importance, const bw_quantized *out,
                           bw_grid_fn find_grid, void *context);

/* Zeros of one stored row as numbers; `bytes` is scratch of n_groups + 8. BW_ERR_CODE when one is invalid,
 * BW_ERR_SCALE when a scale of the row is. */
bw_status bw_row_zeros(const bw_quantized *tensor, const bw_layout *layout, ptrdiff_t row, uint8_t *bytes,
                       float *zeros);

#endif
