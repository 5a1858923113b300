// r1fast_kernels._cpu: the only pybind11 file of the CPU module. Arguments are addresses (tensor.data_ptr()) and sizes;
// the Python side has checked shapes, dtypes and contiguity. The instruction set is chosen once, at import.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/ops.h"
#include "cpu_memory.h"

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// A table of the functions of one instruction set, filled from its namespace.
struct Ops {
  const char* name;
#define R1_FIELD(isa, op) decltype(&r1::isa::op) op;
  R1_CPU_NAMES(R1_FIELD, generic)
};

#define R1_ENTRY(isa, op) r1::isa::op,
#define R1_TABLE(isa) \
  { #isa, R1_CPU_NAMES(R1_ENTRY, isa) }

#if defined(R1_X86)
const Ops v4 = R1_TABLE(x86_64_v4), v3 = R1_TABLE(x86_64_v3);
const char* const kTiles = "x86_64_amx";  // v4, and products on matrix tiles
#endif
const Ops generic = R1_TABLE(generic);

struct Choice {
  const Ops& ops;
  const char* name;
};

// Best instruction set of this CPU, or the one named by R1FAST_CPU_ISA if the CPU has it (to test the others).
Choice choose() {
  const char* variable = std::getenv("R1FAST_CPU_ISA");
  const std::string asked = variable ? variable : "";
#if defined(R1_X86)
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (has_v4 && (asked.empty() || asked == kTiles) && v4.matrix_tiles(r1::kMostPieces)) return {v4, kTiles};
  if (has_v4 && (asked.empty() || asked == v4.name)) return {v4, v4.name};
  if (has_v3 && (asked.empty() || asked == v3.name)) return {v3, v3.name};
#endif
  if (asked.empty() || asked == generic.name) return {generic, generic.name};
  throw std::runtime_error("R1FAST_CPU_ISA=" + asked + ": this CPU or build has no such instruction set");
}

// What only the data can tell: sequences that would reach outside of the pack, rows outside of a table.
void check_offsets(const int32_t* cu_seqlens, int64_t sequences, int64_t rows, int64_t max_seqlen) {
  bool rising = cu_seqlens[0] == 0 && cu_seqlens[sequences] == rows;
  int64_t longest = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = int64_t{cu_seqlens[s + 1]} - cu_seqlens[s];
    rising &= length >= 0;
    longest = length > longest ? length : longest;
  }
  if (!rising)
    throw std::invalid_argument("varlen_attention: cu_seqlens must ascend from 0 to " + std::to_string(rows) +
                                ", the rows of q");
  if (longest > max_seqlen)
    throw std::invalid_argument("varlen_attention: max_seqlen is " + std::to_string(max_seqlen) +
                                ", but a sequence has " + std::to_string(longest) + " tokens");
}

void check_groups(const int32_t* cu_groups, int64_t groups, int64_t sequences) {
  bool rising = cu_groups[0] == 0 && cu_groups[groups] == sequences;
  for (int64_t g = 0; g < groups; ++g) rising &= cu_groups[g + 1] > cu_groups[g];
  if (!rising)
    throw std::invalid_argument("prefix_attention: cu_groups must rise from 0 to " + std::to_string(sequences) +
                                ", the sequences of cu_seqlens, by at least 1");
}

bool inside(const int64_t* values, int64_t count, int64_t limit) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= static_cast<uint64_t>(values[i]) < static_cast<uint64_t>(limit);
  return all;
}

void check_positions(const char* op, const int64_t* positions, int64_t rows, int64_t limit) {
  if (!inside(positions, rows, limit))
    throw std::invalid_argument(std::string(op) + ": a position lies outside the tables, which have " +
                                std::to_string(limit) + " rows");
}

void check_slots(const char* op, const int64_t* slots, int64_t rows, int64_t limit) {
  if (!inside(slots, rows, limit))
    throw std::invalid_argument(std::string(op) + ": a slot lies outside the cache, which has " +
                                std::to_string(limit));
}

void check_starts(const int32_t* starts, int64_t sequences, int64_t rows) {
  bool rising = starts[0] == 0 && starts[sequences] == rows;
  for (int64_t s = 0; s < sequences; ++s) rising &= starts[s + 1] >= starts[s];
  if (!rising)
    throw std::invalid_argument("paged_attention: cu_seqlens_q must ascend from 0 to " + std::to_string(rows) +
                                ", the rows of q");
}

void check_attention(int status, int64_t columns, int64_t block, int64_t blocks) {
  if (status == 1) throw std::invalid_argument("paged_attention: the queries of one key head are too wide");
  if (status == 2)
    throw std::invalid_argument("paged_attention: context_lens must lie in [1, " + std::to_string(columns * block) +
                                "], what " + std::to_string(columns) + " blocks of " + std::to_string(block) + " hold");
  if (status == 3)
    throw std::invalid_argument("paged_attention: block_tables names a block outside the cache, which has " +
                                std::to_string(blocks));
  if (status == 4) throw std::bad_alloc();
  if (status == 5) throw std::invalid_argument("paged_attention: a sequence has more queries than its context tokens");
}

// Of a row of sample_token
void check_settings(int status) {
  if (status == 1) throw std::invalid_argument("sample_token: temperature must be >= 0 in every row");
  if (status == 2) throw std::invalid_argument("sample_token: top_k must be >= 0 in every row");
  if (status == 3) throw std::invalid_argument("sample_token: top_p must be > 0 in every row");
}

// Every row has blocks for the keys and values of `steps` tokens, and the tables reach as far.
void check_room(const r1::DecoderCall& call, int64_t steps, int64_t table_rows) {
  if (call.starts || call.sequences != call.rows)
    throw std::invalid_argument("decoder_steps: each row must be a sequence of its own");
  if (steps < 1) throw std::invalid_argument("decoder_steps: steps must be at least 1");
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t first = int64_t{call.contexts[row]} - 1, last = first + steps - 1;
    bool room = first >= 0 && last < call.columns * call.block && call.positions[row] + steps <= table_rows;
    for (int64_t b = first / call.block; room && b <= last / call.block; ++b) {
      const int32_t block = call.tables[row * call.table_row + b];
      room = block >= 0 && block < call.blocks;
    }
    if (!room)
      throw std::invalid_argument("decoder_steps: row " + std::to_string(row) + " has no room for " +
                                  std::to_string(steps) + " tokens in its blocks");
  }
}

void check_targets(const int64_t* targets, int64_t rows, int64_t vocabulary) {
  if (!inside(targets, rows, vocabulary))
    throw std::invalid_argument("linear_head: a target lies outside the vocabulary, which has " +
                                std::to_string(vocabulary) + " words");
}

r1::Strided strided(Address data, int64_t row, int64_t head) { return {at<const float>(data), row, head}; }

// DLPack's structures (github.com/dmlc/dlpack, version 0.8), which are an interface between binaries.
struct DLTensor {
  void* data;
  int32_t device_type, device;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct Block {
  DLManagedTensor managed;
  int64_t shape[8];
};

r1::Memory& memory() {
  static auto* kept = new r1::Memory;  // never destroyed: tensors may outlive every static
  return *kept;
}

void release_block(DLManagedTensor* tensor) {
  memory().give_back(tensor->tensor.data);
  delete static_cast<Block*>(tensor->context);
}

py::object memory_tensor(const py::tuple& shape, bool touched) {
  if (shape.size() > 8) throw std::invalid_argument("memory: at most 8 dimensions");
  int64_t count = 1;
  auto* block = new Block{};
  for (size_t i = 0; i < shape.size(); ++i) count *= block->shape[i] = shape[i].cast<int64_t>();
  void* data = count > 0 ? memory().take(count * sizeof(float), touched) : nullptr;
  if (!data) {
    delete block;
    return py::none();
  }
  block->managed = {{data, 1, 0, int32_t(shape.size()), 2, 32, 1, block->shape, nullptr, 0}, block, release_block};
  return py::capsule(&block->managed, "dltensor", [](PyObject* capsule) {  // unless a tensor has taken it over
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    unused->deleter(unused);
  });
}

PYBIND11_MODULE(_cpu, m) {
  const Choice chosen = choose();
  const Ops& ops = chosen.ops;
  m.attr("isa") = chosen.name;
  m.attr("has_matrix_tiles") = chosen.name != ops.name;
  m.def("matrix_tiles", [&ops](int pieces) { return ops.matrix_tiles(pieces); }, py::arg("pieces"));
  using Release = py::call_guard<py::gil_scoped_release>;

  m.def(
      "group_advantage",
      [&ops](Address rewards, Address out, int64_t groups, int64_t group_size, bool normalize, double eps) {
        ops.group_advantage(at<const float>(rewards), at<float>(out), groups, group_size, normalize, eps);
      },
      Release());
  m.def(
      "group_advantage_ids",
      [&ops](Address rewards, Address ids, Address out, int64_t count, bool normalize, double eps) {
        if (!ops.group_advantage_ids(at<const float>(rewards), at<const int64_t>(ids), at<float>(out), count, normalize,
                                     eps))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "grpo_loss",
      [&ops](Address logp, Address old_logp, Address ref_logp, Address advantages, Address weights, int64_t rows,
             float low, float high, float kl_coef, int kl_kind, Address loss, Address slope, Address stats) {
        ops.grpo_loss(at<const float>(logp), at<const float>(old_logp), at<const float>(ref_logp),
                      at<const float>(advantages), at<const float>(weights), rows, low, high, kl_coef, kl_kind,
                      at<float>(loss), at<float>(slope), at<float>(stats));
      },
      Release());
  py::class_<r1::DecoderCall>(m, "DecoderCall")
      .def(py::init([](Address layers, int64_t count, Address embedding, int64_t vocabulary, Address norm, Address cos,
                       Address sin, int64_t table_rows, int64_t hidden, int64_t inner, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, int64_t blocks, int64_t block, float eps, Address tokens, Address positions,
                       Address slots, Address tables, Address contexts, Address starts, int64_t rows, int64_t sequences,
                       int64_t columns, int64_t table_row) {
        if (starts) check_starts(at<const int32_t>(starts), sequences, rows);
        if (!inside(at<const int64_t>(tokens), rows, vocabulary))
          throw std::invalid_argument("decoder_forward: a token lies outside the vocabulary, which has " +
                                      std::to_string(vocabulary) + " words");
        check_positions("decoder_forward", at<const int64_t>(positions), rows, table_rows);
        check_slots("decoder_forward", at<const int64_t>(slots), rows, blocks * block);
        return r1::DecoderCall{at<const r1::DecoderLayer>(layers), at<const float>(embedding), at<const float>(norm),
                               at<const float>(cos), at<const float>(sin), count, hidden, inner, heads, kv_heads,
                               head_dim, blocks, block, eps, at<const int64_t>(tokens), at<const int64_t>(positions),
                               at<const int64_t>(slots), at<const int32_t>(tables), at<const int32_t>(contexts),
                               at<const int32_t>(starts), rows, sequences, columns, table_row, nullptr};
      }));
  m.def(
      "decoder_forward",
      [&ops](r1::DecoderCall& call, Address out) {
        call.out = at<float>(out);
        check_attention(ops.decoder_forward(call), call.columns, call.block, call.blocks);
      },
      Release());
  m.def(
      "decoder_steps",
      [&ops](const r1::DecoderCall& call, int64_t table_rows, Address head, int64_t vocabulary, Address seed,
             Address sequence, Address temperature, Address top_k, Address top_p, Address stops, int64_t stop_columns,
             int64_t steps, double seconds, Address token, Address logprob, Address logprob_full) {
        check_room(call, steps, table_rows);
        int64_t done = 0;
        const int status = ops.decoder_steps(
            {call, at<const float>(head), vocabulary, at<const int64_t>(seed), at<const int64_t>(sequence),
             at<const float>(temperature), at<const int32_t>(top_k), at<const float>(top_p), at<const int64_t>(stops),
             stop_columns, steps, seconds, at<int64_t>(token), at<float>(logprob), at<float>(logprob_full)},
            &done);
        check_attention(status, call.columns, call.block, call.blocks);
        check_settings(status - 5);
        return done;
      },
      Release());
  m.def(
      "linear_forward",
      [&ops](Address x, int64_t x_row, Address weight, Address bias, int64_t rows, int64_t width, int64_t outputs,
             Address y) {
        if (!ops.linear_forward(at<const float>(x), x_row, at<const float>(weight), at<const float>(bias), rows, width,
                                outputs, at<float>(y)))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "linear_backward_input",
      [&ops](Address d_y, int64_t d_row, Address weight, int64_t rows, int64_t width, int64_t outputs, Address d_x) {
        if (!ops.linear_backward_input(at<const float>(d_y), d_row, at<const float>(weight), rows, width, outputs,
                                       at<float>(d_x)))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "linear_backward_weight",
      [&ops](Address d_y, int64_t d_row, Address x, int64_t x_row, int64_t rows, int64_t width, int64_t outputs,
             Address d_weight, Address d_bias) {
        if (!ops.linear_backward_weight(at<const float>(d_y), d_row, at<const float>(x), x_row, rows, width, outputs,
                                        at<float>(d_weight), at<float>(d_bias)))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "linear_head",
      [&ops](Address hidden, Address weight, Address targets, int64_t rows, int64_t width, int64_t vocabulary,
             float scale, int loss, Address slopes, Address old_logp, Address ref_logp, Address advantages,
             Address weights, float low, float high, float kl_coef, int kl_kind, Address logp, Address entropy,
             Address d_hidden, Address d_weight, Address stats) {
        check_targets(at<const int64_t>(targets), rows, vocabulary);
        if (!ops.linear_head({at<const float>(hidden), at<const float>(weight), at<const int64_t>(targets), rows, width,
                              vocabulary, scale, loss, at<const float>(slopes), at<const float>(old_logp),
                              at<const float>(ref_logp), at<const float>(advantages), at<const float>(weights), low,
                              high, kl_coef, kl_kind, at<float>(logp), at<float>(entropy), at<float>(d_hidden),
                              at<float>(d_weight), at<float>(stats)}))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "paged_append",
      [&ops](Address k, int64_t k_stride, Address v, int64_t v_stride, Address keys, Address values, Address slots,
             int64_t tokens, int64_t row, int64_t all_slots) {
        check_slots("paged_append", at<const int64_t>(slots), tokens, all_slots);
        ops.paged_append(at<const float>(k), k_stride, at<const float>(v), v_stride, at<float>(keys),
                         at<float>(values), at<const int64_t>(slots), tokens, row);
      },
      Release());
  m.def(
      "paged_attention",
      [&ops](Address q, int64_t q_row, Address keys, Address values, Address tables, int64_t table_row,
             Address contexts, Address starts, Address out, int64_t rows, int64_t sequences, int64_t heads,
             int64_t kv_heads, int64_t width, int64_t blocks, int64_t block, int64_t columns, float scale) {
        if (starts) check_starts(at<const int32_t>(starts), sequences, rows);
        const int status = ops.paged_attention(
            {at<const float>(q), q_row, at<const float>(keys), at<const float>(values), at<const int32_t>(tables),
             table_row, at<const int32_t>(contexts), at<const int32_t>(starts), at<float>(out), rows, sequences, heads,
             kv_heads, width, blocks, block, columns, scale});
        check_attention(status, columns, block, blocks);
      },
      Release());
  m.def(
      "sample_token",
      [&ops](Address logits, Address seed, Address sequence, Address position, Address temperature, Address top_k,
             Address top_p, Address token, Address logprob, Address logprob_full, int64_t rows, int64_t vocabulary) {
        const int status = ops.sample_token(
            at<const float>(logits), at<const int64_t>(seed), at<const int64_t>(sequence), at<const int64_t>(position),
            at<const float>(temperature), at<const int32_t>(top_k), at<const float>(top_p), at<int64_t>(token),
            at<float>(logprob), at<float>(logprob_full), rows, vocabulary);
        check_settings(status);
        if (status == 4) throw std::bad_alloc();
      },
      Release());
  m.def("philox_words", [&ops](Address counters, Address keys, Address out, int64_t count) {
    ops.philox_words(at<const uint32_t>(counters), at<const uint32_t>(keys), at<uint32_t>(out), count);
  });
  m.def("vector_exp", [&ops](Address x, Address out, int64_t count) {
    ops.vector_exp(at<const float>(x), at<float>(out), count);
  });
  m.def(
      "attention_forward",
      [&ops](Address q, int64_t q_row, int64_t q_head, Address k, int64_t k_row, int64_t k_head, Address v,
             int64_t v_row, int64_t v_head, Address cu_seqlens, int64_t sequences, Address cu_groups, int64_t groups,
             int64_t rows, int64_t max_seqlen, int64_t heads, int64_t kv_heads, int64_t dim, float scale, Address out,
             Address softmax) {
        const auto* offsets = at<const int32_t>(cu_seqlens);
        check_offsets(offsets, sequences, rows, max_seqlen);
        if (cu_groups) check_groups(at<const int32_t>(cu_groups), groups, sequences);
        if (!ops.attention_forward(strided(q, q_row, q_head), strided(k, k_row, k_head), strided(v, v_row, v_head),
                                   offsets, at<const int32_t>(cu_groups), groups, heads, kv_heads, dim, scale,
                                   at<float>(out), at<r1::Softmax>(softmax)))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "attention_backward",
      [&ops](Address q, int64_t q_row, int64_t q_head, Address k, int64_t k_row, int64_t k_head, Address v,
             int64_t v_row, int64_t v_head, Address d_out, int64_t d_row, int64_t d_head, Address cu_seqlens,
             Address cu_groups, int64_t groups, int64_t heads, int64_t kv_heads, int64_t dim, float scale, Address out,
             Address softmax, Address d_q, Address d_k, Address d_v) {
        if (!ops.attention_backward(strided(q, q_row, q_head), strided(k, k_row, k_head), strided(v, v_row, v_head),
                                    strided(d_out, d_row, d_head), at<const float>(out), at<const r1::Softmax>(softmax),
                                    at<const int32_t>(cu_seqlens), at<const int32_t>(cu_groups), groups, heads,
                                    kv_heads, dim, scale, at<float>(d_q), at<float>(d_k), at<float>(d_v)))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "rms_norm_forward",
      [&ops](Address x, int64_t row, int64_t head, int64_t rows, int64_t inner, int64_t width, Address residual,
             Address weight, float eps, Address total, Address y, Address scale) {
        ops.rms_norm_forward(strided(x, row, head), rows, inner, width, at<const float>(residual),
                             at<const float>(weight), eps, at<float>(total), at<float>(y), at<float>(scale));
      },
      Release());
  m.def(
      "rms_norm_backward",
      [&ops](Address s, int64_t row, int64_t head, int64_t rows, int64_t inner, int64_t width, Address weight,
             Address scale, Address d_y, Address d_total, Address d_x, Address d_weight) {
        if (!ops.rms_norm_backward(strided(s, row, head), rows, inner, width, at<const float>(weight),
                                   at<const float>(scale), at<const float>(d_y), at<const float>(d_total),
                                   at<float>(d_x), at<float>(d_weight)))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "rope",
      [&ops](Address q, int64_t q_row, int64_t q_head, Address k, int64_t k_row, int64_t k_head, Address cos,
             Address sin, int64_t table_rows, Address positions, int64_t rows, int64_t heads, int64_t kv_heads,
             int64_t half, float turn, Address q_out, Address k_out) {
        check_positions("rope", at<const int64_t>(positions), rows, table_rows);
        ops.rope(strided(q, q_row, q_head), strided(k, k_row, k_head), at<const float>(cos), at<const float>(sin),
                 at<const int64_t>(positions), rows, heads, kv_heads, half, turn, at<float>(q_out), at<float>(k_out));
      },
      Release());
  m.def(
      "rope_append",
      [&ops](Address q, int64_t q_row, int64_t q_head, Address k, int64_t k_row, int64_t k_head, Address v,
             int64_t v_row, int64_t v_head, Address cos, Address sin, int64_t table_rows, Address positions,
             Address slots, int64_t all_slots, Address q_norm, Address k_norm, float eps, int64_t rows, int64_t heads,
             int64_t kv_heads, int64_t half, Address q_out, Address keys, Address values) {
        check_positions("rope_append", at<const int64_t>(positions), rows, table_rows);
        check_slots("rope_append", at<const int64_t>(slots), rows, all_slots);
        ops.rope_append({strided(q, q_row, q_head), strided(k, k_row, k_head), strided(v, v_row, v_head),
                         at<const float>(cos), at<const float>(sin), at<const int64_t>(positions),
                         at<const int64_t>(slots), at<const float>(q_norm), at<const float>(k_norm), eps, rows, heads,
                         kv_heads, half, at<float>(q_out), at<float>(keys), at<float>(values)});
      },
      Release());
  m.def(
      "qkv_rope_forward",
      [&ops](Address qkv, int64_t row, Address cos, Address sin, int64_t table_rows, Address positions, Address q_norm,
             Address k_norm, float eps, int64_t rows, int64_t heads, int64_t kv_heads, int64_t half, Address q_out,
             Address k_out) {
        check_positions("qkv_rope", at<const int64_t>(positions), rows, table_rows);
        ops.qkv_rope_forward({at<const float>(qkv), row, at<const float>(cos), at<const float>(sin),
                              at<const int64_t>(positions), at<const float>(q_norm), at<const float>(k_norm), eps, rows,
                              heads, kv_heads, half},
                             at<float>(q_out), at<float>(k_out));
      },
      Release());
  m.def(
      "qkv_rope_backward",
      [&ops](Address qkv, int64_t row, Address cos, Address sin, int64_t table_rows, Address positions, Address q_norm,
             Address k_norm, float eps, int64_t rows, int64_t heads, int64_t kv_heads, int64_t half, Address d_q,
             int64_t q_row, int64_t q_head, Address d_k, int64_t k_row, int64_t k_head, Address d_v, int64_t v_row,
             int64_t v_head, Address d_qkv, Address d_q_norm, Address d_k_norm) {
        if (!ops.qkv_rope_backward({at<const float>(qkv), row, at<const float>(cos), at<const float>(sin),
                                    at<const int64_t>(positions), at<const float>(q_norm), at<const float>(k_norm), eps,
                                    rows, heads, kv_heads, half},
                                   {strided(d_q, q_row, q_head), strided(d_k, k_row, k_head),
                                    strided(d_v, v_row, v_head), at<float>(d_qkv), at<float>(d_q_norm),
                                    at<float>(d_k_norm)}))
          throw std::bad_alloc();
      },
      Release());
  m.def(
      "swiglu_forward",
      [&ops](Address gate_up, int64_t row, int64_t rows, int64_t width, Address out) {
        ops.swiglu_forward(at<const float>(gate_up), row, rows, width, at<float>(out));
      },
      Release());
  m.def(
      "swiglu_backward",
      [&ops](Address gate_up, int64_t row, Address d_out, int64_t rows, int64_t width, Address d_gate_up) {
        ops.swiglu_backward(at<const float>(gate_up), row, at<const float>(d_out), rows, width, at<float>(d_gate_up));
      },
      Release());
  m.def("memory_in_use", [] { return memory().in_use(); });
  m.def("memory", &memory_tensor, py::arg("shape"), py::arg("touched") = false,
        "None or a DLPack capsule of float32 [shape], whose block comes back with its tensor");
}
