// r1fast_kernels._cuda: the only pybind11 file of the CUDA module. Imports without a driver (the runtime is linked in);
// a launch that fails raises RuntimeError with CUDA's own words.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/ops.h"

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise_on(int error, const char* op) {
  if (error != 0) throw std::runtime_error(std::string(op) + ": " + r1_cuda_error(error));
}

PYBIND11_MODULE(_cuda, m) {
  m.def("group_advantage", [](Address rewards, Address out, int64_t groups, int64_t group_size, bool normalize,
                              double eps, Address stream) {
    raise_on(r1_cuda_group_advantage(at<const float>(rewards), at<float>(out), groups, group_size, normalize, eps,
                                     at<void>(stream)),
             "group_advantage");
  });
  m.def("group_advantage_ids", [](Address rewards, Address ids, Address out, int64_t count, bool normalize, double eps,
                                  Address stream) {
    raise_on(r1_cuda_group_advantage_ids(at<const float>(rewards), at<const int64_t>(ids), at<float>(out), count,
                                         normalize, eps, at<void>(stream)),
             "group_advantage");
  });
  m.attr("sample_token_limit") = r1_cuda_sample_token_limit();
  m.def("grpo_loss_blocks", &r1_cuda_grpo_loss_blocks);
  m.def("grpo_loss", [](Address logp, Address old_logp, Address ref_logp, Address advantages, Address weights,
                        int64_t rows, float low, float high, float kl_coef, int kl_kind, Address loss, Address slope,
                        Address partial, Address stats, Address stream) {
    raise_on(r1_cuda_grpo_loss(at<const float>(logp), at<const float>(old_logp), at<const float>(ref_logp),
                               at<const float>(advantages), at<const float>(weights), rows, low, high, kl_coef, kl_kind,
                               at<float>(loss), at<float>(slope), at<float>(partial), at<float>(stats),
                               at<void>(stream)),
             "grpo_loss");
  });
  m.def("sample_token", [](Address logits, int type, Address seed, Address sequence, Address position,
                           Address temperature, Address top_k, Address top_p, Address token, Address logprob,
                           Address logprob_full, int64_t rows, int64_t vocabulary, Address stream) {
    raise_on(r1_cuda_sample_token(at<const void>(logits), type, at<const int64_t>(seed), at<const int64_t>(sequence),
                                  at<const int64_t>(position), at<const float>(temperature), at<const int32_t>(top_k),
                                  at<const float>(top_p), at<int64_t>(token), at<float>(logprob),
                                  at<float>(logprob_full), rows, vocabulary, at<void>(stream)),
             "sample_token");
  });
  m.def("paged_attention_splits", &r1_cuda_paged_attention_splits);
  m.def("paged_attention", [](Address q, int64_t q_stride, Address keys, Address values, int type, Address tables,
                              int64_t table_stride, Address contexts, Address groups, int64_t groups_stride,
                              Address out, Address partial, int64_t sequences, int64_t heads, int64_t kv_heads,
                              int64_t width, int64_t blocks, int64_t block, int64_t columns, float scale,
                              Address stream) {
    raise_on(r1_cuda_paged_attention(at<const void>(q), q_stride, at<const void>(keys), at<const void>(values), type,
                                     at<const int32_t>(tables), table_stride, at<const int32_t>(contexts),
                                     at<const int32_t>(groups), groups_stride, at<void>(out), at<float>(partial),
                                     sequences, heads, kv_heads, width, blocks, block, columns, scale,
                                     at<void>(stream)),
             "paged_attention");
  });
  m.def("paged_append", [](Address k, int64_t k_stride, Address v, int64_t v_stride, Address keys, Address values,
                           Address slots, int64_t tokens, int64_t row, int64_t all_slots, int64_t size,
                           Address stream) {
    raise_on(r1_cuda_paged_append(at<const void>(k), k_stride, at<const void>(v), v_stride, at<void>(keys),
                                  at<void>(values), at<const int64_t>(slots), tokens, row, all_slots, size,
                                  at<void>(stream)),
             "paged_append");
  });
  m.def("rope_append", [](int type, Address q, int64_t q_row, int64_t q_head, Address k, int64_t k_row, int64_t k_head,
                          Address v, int64_t v_row, int64_t v_head, Address cos, Address sin, int64_t table_rows,
                          Address positions, Address slots, int64_t all_slots, Address q_norm, Address k_norm,
                          float eps, int64_t rows, int64_t heads, int64_t kv_heads, int64_t half, Address q_out,
                          Address keys, Address values, Address stream) {
    raise_on(r1_cuda_rope_append(type, at<const void>(q), q_row, q_head, at<const void>(k), k_row, k_head,
                                 at<const void>(v), v_row, v_head, at<const float>(cos), at<const float>(sin),
                                 table_rows, at<const int64_t>(positions), at<const int64_t>(slots), all_slots,
                                 at<const void>(q_norm), at<const void>(k_norm), eps, rows, heads, kv_heads, half,
                                 at<void>(q_out), at<void>(keys), at<void>(values), at<void>(stream)),
             "rope_append");
  });
}
