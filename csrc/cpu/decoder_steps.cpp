// Several steps of decoding in one call: all layers, the head, the draw, and on to the next token. See
// r1fast/model/native_forward.py. Threads have rows of their own where they can (row_slices.h) and meet once a step, to
// see whether a row has ended; what a row draws depends on neither.
#include <ctime>

#include "ops.h"
#include "row_slices.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {

namespace {

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct State {
  const DecoderSteps& call;
  const Slices slices;
  const double end;           // of the time after which no further step begins
  int64_t *position, *slot;   // [rows], of the step's tokens
  int64_t* next;              // [rows], position + 1
  int32_t *context, *ended;   // [rows]; [steps], whether it is the last
  float *hidden, *logits;     // [rows, hidden], [rows, vocabulary]
  int status = 0;
};

// Step `number` of the rows of a slice; status as decoder_steps returns it. last: whether a row has ended.
int one_step(const State& state, int64_t slice, int64_t number, bool& last) {
  const DecoderSteps& call = state.call;
  const DecoderCall& whole = call.step;
  const int64_t rows = whole.rows, first = state.slices.first[slice], end = state.slices.first[slice + 1];
  for (int64_t row = first; row < end; ++row) {
    const int64_t place = whole.contexts[row] - 1 + number;
    state.context[row] = static_cast<int32_t>(place + 1);
    state.position[row] = whole.positions[row] + number;
    state.next[row] = state.position[row] + 1;
    state.slot[row] = whole.tables[row * whole.table_row + place / whole.block] * whole.block + place % whole.block;
  }
  DecoderCall step = whole;
  step.tokens = number ? call.token + (number - 1) * rows : whole.tokens;
  step.positions = state.position, step.slots = state.slot, step.contexts = state.context, step.out = state.hidden;
  step = slice_of(step, state.slices, slice);
  const int status = decoder_forward(step);
  if (status) return status;
  const int64_t at = number * rows + first, words = call.vocabulary;
  float* logits = state.logits + first * words;
  if (!linear_forward(step.out, whole.hidden, call.head, nullptr, end - first, whole.hidden, words, logits)) return 4;
  const int drawn = sample_token(logits, call.seed + first, call.sequence + first, state.next + first,
                                 call.temperature + first, call.top_k + first, call.top_p + first, call.token + at,
                                 call.logprob + at, call.logprob_full + at, end - first, words);
  if (drawn) return drawn == 4 ? 4 : 5 + drawn;
  for (int64_t row = first; row < end; ++row)
    for (int64_t s = 0; s < call.stop_columns; ++s)
      last |= call.stops[row * call.stop_columns + s] == call.token[number * rows + row];
  return 0;
}

// All steps, for the slices of one thread of `threads`; returns how many there were.
int64_t run(State& state, int64_t thread, int64_t threads) {
  for (int64_t number = 0; number < state.call.steps; ++number) {
    for (int64_t slice = thread; slice < state.slices.count; slice += threads) {
      bool last = false;
      const int status = one_step(state, slice, number, last);
      if (status) {
#pragma omp atomic write
        state.status = status;
      }
      if (status || last || (slice == 0 && now() > state.end)) {
#pragma omp atomic write
        state.ended[number] = 1;
      }
    }
#pragma omp barrier
    int32_t ended;
#pragma omp atomic read
    ended = state.ended[number];
    if (ended) return number + 1;
  }
  return state.call.steps;
}

}  // namespace

int decoder_steps(const DecoderSteps& call, int64_t* done) {
  const int64_t rows = call.step.rows;
  Scratch memory;
  const int64_t floats = round_up(rows * call.step.hidden, 16) + round_up(rows * call.vocabulary, 16);
  if (!memory.reserve(floats + 3 * 2 * rows + rows + call.steps)) return 4;
  float *hidden = memory.data(), *logits = hidden + round_up(rows * call.step.hidden, 16);
  int64_t* position = reinterpret_cast<int64_t*>(hidden + floats);
  int32_t* context = reinterpret_cast<int32_t*>(position + 3 * rows);
  State state{call, slices_of(call.step, call.steps), now() + call.seconds, position, position + rows,
              position + 2 * rows, context, context + rows, hidden, logits};
  std::memset(state.ended, 0, call.steps * sizeof(int32_t));
  if (state.slices.count == 1) {  // not within a region: the threads of those in it would be made anew each time
    *done = run(state, 0, 1);
    return state.status;
  }
#pragma omp parallel num_threads(state.slices.count)
  {
    alone();
    const int64_t count = run(state, this_thread(), team_size());
    if (this_thread() == 0) *done = count;
  }
  return state.status;
}

}  // namespace R1_ISA
}  // namespace r1
