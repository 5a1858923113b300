// The launchers of csrc/cuda: compiled by nvcc without pybind11 (2 s a file instead of 24) and bound by g++.
// Pointers are device memory, `stream` is a cudaStream_t; each returns a cudaError_t as int, 0 for success.
#pragma once

#include <cstdint>

// Element types of what a launcher takes as void*; the wrappers know the numbers (kernels/native.py).
enum R1Type : int { kFloat = 0, kBf16 = 1, kHalf = 2 };

extern "C" {
const char* r1_cuda_error(int error);
// rewards, out: [groups * group_size]
int r1_cuda_group_advantage(const float* rewards, float* out, int64_t groups, int64_t group_size, bool normalize,
                            double eps, void* stream);
// rewards, ids, out: [count]; compares every row with every other
int r1_cuda_group_advantage_ids(const float* rewards, const int64_t* ids, float* out, int64_t count, bool normalize,
                                double eps, void* stream);
// All [rows], any alignment. partial: 5 * blocks(rows); stats: kl_sum, clipped_sum, ratio_sum, count, ratio_max
int64_t r1_cuda_grpo_loss_blocks(int64_t rows);
int r1_cuda_grpo_loss(const float* logp, const float* old_logp, const float* ref_logp, const float* advantages,
                      const float* weights, int64_t rows, float low, float high, float kl_coef, int kl_kind,
                      float* loss, float* slope, float* partial, float* stats, void* stream);
// logits: [rows, vocabulary], vocabulary <= limit; all others [rows]. A setting out of its range: token 0 and NaN
int64_t r1_cuda_sample_token_limit();
int r1_cuda_sample_token(const void* logits, int type, const int64_t* seed, const int64_t* sequence,
                         const int64_t* position, const float* temperature, const int32_t* top_k, const float* top_p,
                         int64_t* token, float* logprob, float* logprob_full, int64_t rows, int64_t vocabulary,
                         void* stream);
// One query a sequence, any of them `q_stride` apart. keys, values: [blocks, block, kv_heads, width], aligned to 16 bytes;
// tables: [sequences, columns] with rows `table_stride` apart; width: a multiple of 8 up to 256. partial: floats,
// sequences * splits(columns, block) * heads * (width + 2). What is outside the cache is not read: NaN for the sequence.
// groups: null, or [splits, sequences] with rows `groups_stride` apart: the rows from groups[p, s] to s have the same
// blocks in split p, and in the 16-bit types they are read once for all of them
int64_t r1_cuda_paged_attention_splits(int64_t columns, int64_t block);
int r1_cuda_paged_attention(const void* q, int64_t q_stride, const void* keys, const void* values, int type,
                            const int32_t* tables, int64_t table_stride, const int32_t* contexts,
                            const int32_t* groups, int64_t groups_stride, void* out, float* partial, int64_t sequences,
                            int64_t heads, int64_t kv_heads, int64_t width, int64_t blocks, int64_t block,
                            int64_t columns, float scale, void* stream);
// Tokens of `row` elements of `size` bytes, a stride apart; slots outside the cache are left out
int r1_cuda_paged_append(const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* keys, void* values,
                         const int64_t* slots, int64_t tokens, int64_t row, int64_t all_slots, int64_t size,
                         void* stream);
// q, k, v, q_out: [rows, heads or kv_heads, 2 half], the last without gaps; cos, sin: [table_rows, half]; keys, values:
// [all_slots, kv_heads, 2 half]; q_norm, k_norm: [2 half], or null. For a position outside the tables q_out is NaN and
// nothing is written; a slot outside the cache is left out
int r1_cuda_rope_append(int type, const void* q, int64_t q_row, int64_t q_head, const void* k, int64_t k_row,
                        int64_t k_head, const void* v, int64_t v_row, int64_t v_head, const float* cos,
                        const float* sin, int64_t table_rows, const int64_t* positions, const int64_t* slots,
                        int64_t all_slots, const void* q_norm, const void* k_norm, float eps, int64_t rows,
                        int64_t heads, int64_t kv_heads, int64_t half, void* q_out, void* keys, void* values,
                        void* stream);
}
