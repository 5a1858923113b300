// What csrc/cpu gives: declared once per instruction set, see host_device.h. Pointers are to contiguous memory unless a
// stride (in elements) says otherwise. The files of csrc/cpu use no standard containers or algorithms: their templates
// would be shared between the instruction sets by the linker. Rows run on OpenMP threads where there is enough to do.
#pragma once

#include "../common/host_device.h"

// Every function, for the table that the bindings fill once per instruction set.
#define R1_CPU_NAMES(X, isa) \
  X(isa, attention_backward) \
  X(isa, attention_forward) \
  X(isa, decoder_forward) \
  X(isa, decoder_steps) \
  X(isa, group_advantage) \
  X(isa, group_advantage_ids) \
  X(isa, grpo_loss) \
  X(isa, linear_backward_input) \
  X(isa, linear_backward_weight) \
  X(isa, linear_forward) \
  X(isa, linear_head) \
  X(isa, matrix_tiles) \
  X(isa, paged_append) \
  X(isa, paged_attention) \
  X(isa, philox_words) \
  X(isa, qkv_rope_backward) \
  X(isa, qkv_rope_forward) \
  X(isa, rms_norm_backward) \
  X(isa, rms_norm_forward) \
  X(isa, rope) \
  X(isa, rope_append) \
  X(isa, sample_token) \
  X(isa, swiglu_backward) \
  X(isa, swiglu_forward) \
  X(isa, vector_exp)

#define R1_CPU_OPS                                                                                                    \
  /* 0; what paged_attention refuses; or 4: memory ran out */                                                           \
  int decoder_forward(const DecoderCall& call);                                                                         \
  /* Steps until a row draws a stop of its own, all are done or the seconds are over; `done`: how many. The same, or */ \
  /* 6, 7, 8: a setting that sample_token refuses as 1, 2, 3 */                                                        \
  int decoder_steps(const DecoderSteps& call, int64_t* done);                                                          \
  /* rewards, out: [groups * group_size] */                                                                           \
  void group_advantage(const float* rewards, float* out, int64_t groups, int64_t group_size, bool normalize,          \
                       double eps);                                                                                   \
  /* rewards, ids, out: [count]; false when memory runs out */                                                        \
  bool group_advantage_ids(const float* rewards, const int64_t* ids, float* out, int64_t count, bool normalize,       \
                           double eps);                                                                               \
  /* All [rows]; low, high: bounds of the ratio. stats: kl_sum, clipped_sum, ratio_sum, count, ratio_max */            \
  void grpo_loss(const float* logp, const float* old_logp, const float* ref_logp, const float* advantages,            \
                 const float* weights, int64_t rows, float low, float high, float kl_coef, int kl_kind, float* loss,  \
                 float* slope, float* stats);                                                                         \
  /* x: [rows, width], `x_row` apart; weight: [outputs, width]; bias: [outputs] or null; y: [rows, outputs]. */       \
  /* The backward's d_y: [rows, outputs], `d_row` apart; d_bias null where not wanted. False when memory runs out */  \
  bool linear_forward(const float* x, int64_t x_row, const float* weight, const float* bias, int64_t rows,            \
                      int64_t width, int64_t outputs, float* y);                                                      \
  bool linear_backward_input(const float* d_y, int64_t d_row, const float* weight, int64_t rows, int64_t width,       \
                             int64_t outputs, float* d_x);                                                            \
  bool linear_backward_weight(const float* d_y, int64_t d_row, const float* x, int64_t x_row, int64_t rows,           \
                              int64_t width, int64_t outputs, float* d_weight, float* d_bias);                        \
  /* False when memory runs out */                                                                                    \
  bool linear_head(const HeadCall& call);                                                                             \
  /* Products of float32 on bfloat16 tiles, of that many pieces, or not (0). False where there are none */             \
  bool matrix_tiles(int pieces);                                                                                      \
  /* k, v: tokens of `row` floats, `stride` apart; keys, values: [all slots, row]; slots: inside of the cache */        \
  void paged_append(const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* keys, float* values,   \
                    const int64_t* slots, int64_t tokens, int64_t row);                                               \
  /* 0, or 1: the queries of a key head are too wide, 2: a context does not fit its table, 3: a block is outside, */  \
  /* 4: memory ran out, 5: a sequence has more queries than its context has tokens */                                 \
  int paged_attention(const PagedAttention& call);                                                                    \
  /* counters: [count, 4], keys: [count, 2], out: [count, 4] */                                                       \
  void philox_words(const uint32_t* counters, const uint32_t* keys, uint32_t* out, int64_t count);                    \
  /* logits: [rows, vocabulary], all others [rows]. 0, or which setting is out of its range: 1 temperature, */        \
  /* 2 top_k, 3 top_p; or 4: memory ran out */                                                                        \
  int sample_token(const float* logits, const int64_t* seed, const int64_t* sequence, const int64_t* position,        \
                   const float* temperature, const int32_t* top_k, const float* top_p, int64_t* token,                \
                   float* logprob, float* logprob_full, int64_t rows, int64_t vocabulary);                            \
  /* x, out: [count] */                                                                                               \
  void vector_exp(const float* x, float* out, int64_t count);                                                         \
  /* q, d_out: [T, heads, dim]; k, v: [T, kv_heads, dim]; out, d_q, d_k, d_v of those shapes; softmax: [T, heads]; */ \
  /* cu_seqlens: [sequences + 1], rising; cu_groups: [groups + 1], of sequences, null where each is alone (groups is */ \
  /* then their number); scale > 0; dim <= 256. False when memory runs out */                                         \
  bool attention_forward(Strided q, Strided k, Strided v, const int32_t* cu_seqlens, const int32_t* cu_groups,        \
                         int64_t groups, int64_t heads, int64_t kv_heads, int64_t dim, float scale, float* out,       \
                         Softmax* softmax);                                                                           \
  bool attention_backward(Strided q, Strided k, Strided v, Strided d_out, const float* out, const Softmax* softmax,   \
                          const int32_t* cu_seqlens, const int32_t* cu_groups, int64_t groups, int64_t heads,         \
                          int64_t kv_heads, int64_t dim, float scale, float* d_q, float* d_k, float* d_v);            \
  /* x: [rows / inner, inner, width]; weight, d_weight: [width]; scale: [rows], 1 / rms; all others [rows, width]: */ \
  /* residual, total = x + residual and d_total (null where there is none); s: what was normalised, x or total */     \
  void rms_norm_forward(Strided x, int64_t rows, int64_t inner, int64_t width, const float* residual,                 \
                        const float* weight, float eps, float* total, float* y, float* scale);                        \
  /* False when memory runs out */                                                                                    \
  bool rms_norm_backward(Strided s, int64_t rows, int64_t inner, int64_t width, const float* weight,                  \
                         const float* scale, const float* d_y, const float* d_total, float* d_x, float* d_weight);    \
  /* q, q_out: [rows, heads, 2 half]; k, k_out: [rows, kv_heads, 2 half]; cos, sin: [P, half]; */                     \
  /* positions: [rows], in [0, P); turn: 1, or -1 to rotate back */                                                   \
  void rope(Strided q, Strided k, const float* cos, const float* sin, const int64_t* positions, int64_t rows,         \
            int64_t heads, int64_t kv_heads, int64_t half, float turn, float* q_out, float* k_out);                   \
  /* half <= 512 */                                                                                                   \
  void rope_append(const RopeAppend& call);                                                                           \
  /* half <= 512; q_out: [rows, heads, 2 half]; k_out: [rows, kv_heads, 2 half] */                                    \
  void qkv_rope_forward(const QkvRope& call, float* q_out, float* k_out);                                             \
  /* False when memory runs out */                                                                                    \
  bool qkv_rope_backward(const QkvRope& call, const QkvGradient& gradient);                                           \
  /* gate_up: [rows, 2 width], `row` apart; d_gate_up: [rows, 2 width]; out, d_out: [rows, width] */                  \
  void swiglu_forward(const float* gate_up, int64_t row, int64_t rows, int64_t width, float* out);                    \
  void swiglu_backward(const float* gate_up, int64_t row, const float* d_out, int64_t rows, int64_t width,            \
                       float* d_gate_up);

namespace r1 {

// A tensor [rows, heads, width] whose last dimension is contiguous; the other strides in elements.
struct Strided {
  const float* data;
  int64_t row, head;
};

// Of a row of attention: its largest score, and 1 / sum of exp(score - largest).
struct Softmax {
  float most, inverse;
};

// Queries over the paged cache: of sequence s the rows starts[s] to starts[s + 1], the last of its context.
struct PagedAttention {
  const float* q;  // [rows, heads, width], `q_row` apart
  int64_t q_row;
  const float *keys, *values;  // [blocks, block, kv_heads, width]
  const int32_t* tables;       // [sequences, columns], `table_row` apart
  int64_t table_row;
  const int32_t *contexts, *starts;  // [sequences], [sequences + 1] from 0 to rows, or null: one row each
  float* out;                        // [rows, heads, width]
  int64_t rows, sequences, heads, kv_heads, width, blocks, block, columns;
  float scale;
};

// Tokens on their way from the fused projection to attention.
struct QkvRope {
  const float* qkv;  // [rows, heads + 2 kv_heads, 2 half], `row` apart
  int64_t row;
  const float *cos, *sin;         // [P, half]
  const int64_t* positions;       // [rows], in [0, P)
  const float *q_norm, *k_norm;   // [2 half], or null: no norm
  float eps;
  int64_t rows, heads, kv_heads, half;
};
struct QkvGradient {
  Strided d_q, d_k, d_v;
  float* d_qkv;                 // contiguous
  float *d_q_norm, *d_k_norm;   // [2 half], written where there are norms
};

// New tokens on their way to attention over the cache.
struct RopeAppend {
  Strided q, k, v;                      // [rows, heads or kv_heads, 2 half]
  const float *cos, *sin;               // [P, half]
  const int64_t *positions, *slots;     // [rows], in [0, P) and of the cache's slots
  const float *q_norm, *k_norm;         // [2 half], or null: no norm
  float eps;
  int64_t rows, heads, kv_heads, half;
  float *q_out, *keys, *values;         // [rows, heads, 2 half]; the cache, [slots, kv_heads, 2 half]
};

// A decoder's weights and its cache, [slots, kv_heads, head_dim] a layer; null: the model has no such weight.
struct DecoderLayer {
  const float *input_norm, *qkv_proj, *qkv_bias, *q_norm, *k_norm, *o_proj, *o_bias, *post_norm, *gate_up_proj,
      *gate_up_bias, *down_proj, *down_bias;
  float *keys, *values;
};

// New tokens of sequences in the cache, each with a table and a context of its own, on their way through all layers.
struct DecoderCall {
  const DecoderLayer* layers;
  const float *embedding, *norm, *cos, *sin;
  int64_t count, hidden, inner, heads, kv_heads, head_dim, blocks, block;  // count: of layers
  float eps;
  const int64_t *tokens, *positions, *slots;  // [rows]
  const int32_t *tables, *contexts, *starts;  // [sequences, columns], `table_row` apart; those of paged_attention
  int64_t rows, sequences, columns, table_row;
  float* out;  // [rows, hidden], after the final norm
};

// Tokens to be drawn one after another. Row i's blocks have room for all of them; it is its own sequence.
struct DecoderSteps {
  DecoderCall step;  // the first; `slots` and `out` go unused
  const float* head;  // [vocabulary, hidden]
  int64_t vocabulary;
  const int64_t *seed, *sequence;  // [rows], these and the next: those of sample_token
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const int64_t* stops;  // [rows, stop_columns], tokens that end a row, -1 for none
  int64_t stop_columns, steps;
  double seconds;                  // after which no further step begins
  int64_t* token;                  // [steps, rows], and the log-probabilities
  float *logprob, *logprob_full;
};

// Hidden states, the head, and a loss that hangs on each row's log-probability.
struct HeadCall {
  enum Loss : int { kNoLoss = 0, kGivenSlope = 1, kGRPO = 2 };
  const float *hidden, *weight;  // [rows, width], [vocabulary, width]
  const int64_t* targets;        // [rows], in [0, vocabulary)
  int64_t rows, width, vocabulary;
  float scale;  // of the logits: 1 / temperature
  int loss;
  const float *slopes, *old_logp, *ref_logp, *advantages, *weights;  // [rows]; null where the loss needs none
  float low, high, kl_coef;
  int kl_kind;
  float *logp, *entropy;       // [rows]; entropy null where it is not wanted
  float *d_hidden, *d_weight;  // [rows, width], [vocabulary, width]; null where they are not wanted
  float* stats;                // loss, kl_sum, clipped_sum, ratio_sum, ratio_max, count; null without GRPO
  bool gradient() const { return d_hidden || d_weight; }
};

constexpr int kMostPieces = 3;  // of a float32 in products on matrix tiles (matrix_tiles.h)

namespace generic {
R1_CPU_OPS
}
namespace x86_64_v3 {
R1_CPU_OPS
}
namespace x86_64_v4 {
R1_CPU_OPS
}
}  // namespace r1
