/* Refinement of 64 rows on the quadratic that GPTQ works on: block coordinate descent over groups.
 *
 * With all other groups fixed, the best values of one group are known in closed form; the group is rounded anew from
 * there, with error feedback inside it and its range searched, then polished code by code and its scale refitted by
 * least squares. A row keeps what it had unless its cost falls. */
#include "blas.h"
#include "tile.h"

#include <string.h>

/* pull = sum over the columns outside the block of E[j] A[j][k]. */
static void find_pull(const bw_factor *f, const bw_block *block, const bw_bench *b) {
    const float *rows = f->hessian + block->first * f->n;
    ptrdiff_t after = block->first + block->n;
    bw_sgemm(0, 0, block->n, BW_TILE_ROWS, block->first, 1, rows, f->n, b->errors, BW_TILE_ROWS, 0, b->pull,
             BW_TILE_ROWS);
    bw_sgemm(0, 0, block->n, BW_TILE_ROWS, f->n - after, 1, rows + after, f->n, b->errors + after * BW_TILE_ROWS,
             BW_TILE_ROWS, 1, b->pull, BW_TILE_ROWS);
}

static double refine_block(const bw_tile_job *job, const bw_block *block, int first_sweep, bw_bench *b) {
    const bw_factor *f = job->factor;
    const bw_isa *isa = bw_cpu();
    ptrdiff_t at = block->first * BW_TILE_ROWS, bytes = block->n * BW_TILE_ROWS * 4;
    const float *hessian = f->hessian + block->first * (f->n + 1);
    float *errors = b->errors + at, before[BW_TILE_ROWS], after[BW_TILE_ROWS];
    uint8_t *codes = b->codes + at;
    int own_range = job->group <= BW_LONGEST_BLOCK;
    bw_tile t = {b->weight + at,
                 b->base,
                 f->local_feedback + block->first * BW_LONGEST_BLOCK,
                 f->local_variance + block->first,
                 BW_LONGEST_BLOCK,
                 block->n,
                 (float)(job->scheme.levels - 1)};
    bw_tile_grid *grid = b->grids + block->group, trial = *grid;
    find_pull(f, block, b);
    memcpy(b->levels, b->pull, (size_t)bytes);
    isa->tile_aim(&t, b->levels, b->base);
    isa->tile_cost(&t, errors, before);
    memcpy(after, before, sizeof after);
    if (own_range) bw_tile_search(job, &t, grid, first_sweep ? BW_NEAR : BW_NEXT, b->trial_errors, &trial, after);
    isa->tile_round(&t, &trial, b->trial_errors, b->trial_codes, after);
    isa->tile_keep(t.n, before, after, &trial, b->trial_errors, b->trial_codes, grid, errors, codes);
    for (int pass = 0; pass < 2; pass++) {
        int moved = isa->tile_descend(&t, hessian, f->n, b->pull, grid, errors, codes);
        if (!moved && pass) break;
        if (own_range) isa->tile_refit(&t, hessian, f->n, b->pull, grid, b->levels, errors, codes);
    }
    isa->tile_cost(&t, errors, after);
    double gain = 0;
    for (int i = 0; i < BW_TILE_ROWS; i++) {
        b->costs[i] -= (double)before[i] - (double)after[i];
        gain += (double)before[i] - (double)after[i];
    }
    return gain;
}

void bw_tile_refine(const bw_tile_job *job, bw_bench *b) {
    for (int sweep = 0; sweep < job->options->sweeps; sweep++) {
        double gain = 0, total = 0;
        for (int i = 0; i < BW_TILE_ROWS; i++) total += b->costs[i];
        for (ptrdiff_t i = 0; i < job->factor->n_blocks; i++)
            gain += refine_block(job, job->factor->blocks + i, sweep == 0, b);
        if (!(gain > job->options->tolerance * total)) break;
    }
}
