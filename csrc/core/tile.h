/* 64 rows of a matrix on their way through GPTQ and refinement: what gptq.c and refine.c share. */
#ifndef BW_TILE_H
#define BW_TILE_H

#include "cpu.h"
#include "factor.h"

/* One worker's scratch; columns stand in the factor's order, all but `grids` are (columns, BW_TILE_ROWS). */
typedef struct {
    float *weight, *errors;      /* all columns; errors = weight - stored value */
    uint8_t *codes;              /* all columns */
    bw_tile_grid *grids;         /* one a group */
    float *base, *pull, *levels; /* one block each */
    float *trial_errors;         /* one block */
    uint8_t *trial_codes;        /* one block */
    float *rows;                 /* max(BW_TILE_ROWS * BW_LONGEST_BLOCK, cols): rows as rows */
    uint8_t *bytes;              /* max(cols, n_groups) + 8 */
    double costs[BW_TILE_ROWS];  /* E A ET so far */
} bw_bench;

typedef struct {
    const bw_factor *factor;
    const bw_gptq_options *options;
    bw_scheme scheme;
    ptrdiff_t group;
} bw_tile_job;

/* How far a search goes: from a min-max range; around a grid that was searched before; right beside it. */
typedef enum { BW_WIDE, BW_NEAR, BW_NEXT } bw_reach;

/* Grids around `start` are tried; the best of each row ends up in `best`, its cost in best_costs (both filled
 * before: what must be beaten). */
void bw_tile_search(const bw_tile_job *job, const bw_tile *tile, const bw_tile_grid *start, bw_reach reach,
                    float *errors, bw_tile_grid *best, float *best_costs);
/* Sweeps of block coordinate descent from what `bench` holds; never raises a row's cost. */
void bw_tile_refine(const bw_tile_job *job, bw_bench *bench);

#endif
