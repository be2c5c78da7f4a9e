/* The kernels in the order they build on each other; included once by each isa/<name>.c after its vocabulary.
 * The table at the end takes each kernel by name. */
#include "convert.h"
#include "../codec/all.h"
#include "rtn.h"
#include "clip.h"
#include "search.h"
#include "gptq.h"
#include "signround.h"
#include "loss.h"
#include "product.h"
#include "trellis.h"
#include "decode.h"

#define BW_TABLE(isa_name, isa_rank, isa_supported) \
    {                                               \
        .name = isa_name,                           \
        .rank = isa_rank,                           \
        .supported = isa_supported,                 \
        .load_row = load_row,                       \
        .store = store,                             \
        .pack = pack,                               \
        .unpack = unpack,                           \
        .rtn_grid = rtn_grid,                       \
        .encode_row = encode_row,                   \
        .decode_row = decode_row,                   \
        .clip_grid = clip_grid,                     \
        .find_ranges = find_ranges,                 \
        .range_grid = range_grid,                   \
        .grid_error = grid_error,                   \
        .tile_round = tile_round,                   \
        .tile_try = tile_try,                       \
        .tile_cost = tile_cost,                     \
        .tile_aim = tile_aim,                       \
        .tile_descend = tile_descend,               \
        .tile_refit = tile_refit,                   \
        .tile_keep = tile_keep,                     \
        .train_forward = train_forward,             \
        .train_backward = train_backward,           \
        .block_max = block_max,                     \
        .block_exp = block_exp,                     \
        .block_kl = block_kl,                       \
        .token_order = token_order,                 \
        .prepare_token = prepare_token,             \
        .multiply_rows = multiply_rows,             \
        .trellis_walk = trellis_walk,               \
        .trellis_values = trellis_values,           \
        .trellis_decode = trellis_decode,           \
        .transpose = transpose,                     \
        .trellis_token = trellis_token,             \
        .trellis_multiply = trellis_multiply,       \
        .round_row = round_row,                     \
        .add_row = add_row,                         \
        .mix_row = mix_row,                         \
        .norm_row = norm_row,                       \
        .rotate_row = rotate_row,                   \
        .activate_row = activate_row,               \
        .clamped_row = clamped_row,                 \
        .attend_scores = attend_scores,             \
        .attend_weights = attend_weights,           \
        .attend_mix = attend_mix,                   \
        .dense_rows = dense_rows,                   \
    }
