// All layers of a decoder for a step of generation, by the ops themselves: see r1fast/model/native_forward.py. What it
// saves is what lies between the ops: 17 calls a layer through Python and a dispatcher, and memory taken anew for each.
#include <cstring>

#include "ops.h"
#include "row_slices.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {

namespace {

struct Work {
  float *residual, *normed, *scale;  // [rows, hidden] twice, [rows]
  float *qkv, *q, *attended;         // [rows, heads + 2 kv_heads, head_dim], [rows, heads, head_dim] twice
  float *gate_up, *active;           // [rows, 2 inner], [rows, inner]
  float* out;                        // [rows, hidden]: of a product, before it is added to the residual
};

bool reserve(const DecoderCall& c, Scratch& memory, Work& w) {
  const int64_t queries = c.heads * c.head_dim, all_heads = queries + 2 * c.kv_heads * c.head_dim;
  const int64_t widths[] = {c.hidden, c.hidden, 1, all_heads, queries, queries, 2 * c.inner, c.inner, c.hidden};
  float** arrays[] = {&w.residual, &w.normed, &w.scale, &w.qkv, &w.q, &w.attended, &w.gate_up, &w.active, &w.out};
  int64_t total = 0;
  for (const int64_t width : widths) total += round_up(c.rows * width, 16);
  if (!memory.reserve(total)) return false;
  float* next = memory.data();
  for (int i = 0; i < 9; ++i) {
    *arrays[i] = next;
    next += round_up(c.rows * widths[i], 16);
  }
  return true;
}

// y = RMSNorm(residual += x), or of the residual alone where x is null.
void norm(const DecoderCall& c, const Work& w, const float* x, const float* weight, float* y) {
  const Strided from{x ? x : w.residual, c.hidden, c.hidden};
  rms_norm_forward(from, c.rows, 1, c.hidden, x ? w.residual : nullptr, weight, c.eps, w.residual, y, w.scale);
}

// Attention of one layer up to its output product, into w.out. Status of paged_attention, or 4.
int attention(const DecoderCall& c, const DecoderLayer& layer, const Work& w) {
  const int64_t width = c.head_dim, row = (c.heads + 2 * c.kv_heads) * width, queries = c.heads * width;
  if (!linear_forward(w.normed, c.hidden, layer.qkv_proj, layer.qkv_bias, c.rows, c.hidden, row, w.qkv)) return 4;
  const float *k = w.qkv + queries, *v = k + c.kv_heads * width;
  rope_append({{w.qkv, row, width}, {k, row, width}, {v, row, width}, c.cos, c.sin, c.positions, c.slots, layer.q_norm,
               layer.k_norm, c.eps, c.rows, c.heads, c.kv_heads, width / 2, w.q, layer.keys, layer.values});
  const int status = paged_attention({w.q, queries, layer.keys, layer.values, c.tables, c.table_row, c.contexts, c.starts,
                                      w.attended, c.rows, c.sequences, c.heads, c.kv_heads, width, c.blocks, c.block,
                                      c.columns, static_cast<float>(1 / __builtin_sqrt(static_cast<double>(width)))});
  if (status) return status;
  return linear_forward(w.attended, queries, layer.o_proj, layer.o_bias, c.rows, queries, c.hidden, w.out) ? 0 : 4;
}

bool mlp(const DecoderCall& c, const DecoderLayer& layer, const Work& w) {
  if (!linear_forward(w.normed, c.hidden, layer.gate_up_proj, layer.gate_up_bias, c.rows, c.hidden, 2 * c.inner,
                      w.gate_up))
    return false;
  swiglu_forward(w.gate_up, 2 * c.inner, c.rows, c.inner, w.active);
  return linear_forward(w.active, c.inner, layer.down_proj, layer.down_bias, c.rows, c.inner, c.hidden, w.out);
}

int all_layers(const DecoderCall& c) {
  Scratch memory;
  Work w;
  if (!reserve(c, memory, w)) return 4;
  for (int64_t i = 0; i < c.rows; ++i)
    std::memcpy(w.residual + i * c.hidden, c.embedding + c.tokens[i] * c.hidden, c.hidden * sizeof(float));
  norm(c, w, nullptr, c.layers[0].input_norm, w.normed);
  for (int64_t l = 0; l < c.count; ++l) {
    const int status = attention(c, c.layers[l], w);
    if (status) return status;
    norm(c, w, w.out, c.layers[l].post_norm, w.normed);
    if (!mlp(c, c.layers[l], w)) return 4;
    const bool last = l + 1 == c.count;
    norm(c, w, w.out, last ? c.norm : c.layers[l + 1].input_norm, last ? c.out : w.normed);
  }
  return 0;
}

}  // namespace

int decoder_forward(const DecoderCall& c) {
  const Slices slices = slices_of(c, 1);
  if (slices.count == 1) return all_layers(c);
  int status = 0;
#pragma omp parallel for schedule(static, 1) num_threads(slices.count)
  for (int64_t s = 0; s < slices.count; ++s) {
    alone();
    const int found = all_layers(slice_of(c, slices, s));
    if (found) {
#pragma omp atomic write
      status = found;
    }
  }
  return status;
}

}  // namespace R1_ISA
}  // namespace r1
