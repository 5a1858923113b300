"""A recipe with every kind of stage and of arrow between them, for tests of the graph and of runs."""

RECIPE = """\
name: fake
threads: 1
model: {template: words, max_length: 160}
tasks:
  totals: {kind: totals}
  chat: {kind: general}
evaluation: {task: totals, limit: 4, samples: 2, sampling: {max_tokens: 64}}
stages:
  base: {kind: pretrain, task: totals}
  zero: {kind: grpo, from: base, mix: [{task: totals}], sampling: {max_tokens: 64}}
  rows: {kind: reject, from: zero, task: totals, sampling: {max_tokens: 64}}
  sft: {kind: sft, from: base, data: [{stage: rows}, {task: totals, limit: 3}]}
  liking: {kind: reward_model, from: sft, task: chat}
  all_rl:
    kind: grpo
    from: sft
    reward_model: liking
    mix: [{task: totals}, {task: chat, rewards: {preference: 1.0}}]
    sampling: {max_tokens: 64}
  student: {kind: pretrain, task: totals, steps: 7}
  distill: {kind: distill, from: student, teacher: all_rl, data: [{stage: rows}]}
  student_rl: {kind: grpo, from: student, mix: [{task: totals}], sampling: {max_tokens: 64}}
"""
NAMES = ["base", "zero", "rows", "sft", "liking", "all_rl", "student", "distill", "student_rl"]
