"""What a model is asked, in our own words, zero-shot as in the paper (appendix D): the question, and in which form the
final answer is to stand, so that the verifier finds it. `{question}` and an item's parts are filled in.

R1's authors advise against system prompts and few-shot examples (they make it worse), so there are none.
"""

PLAIN = "{question}"

MATH = "{question}\n\nReason step by step, and put the final answer inside \\boxed{{}}."

CHOICE = (
    "Answer this multiple-choice question. Reason step by step, then end with a line of its own, `Answer: X`, in which "
    "X is one of the letters {letters}.\n\n{question}\n\n{options}"
)

CHOICE_ZH = (
    "请回答下面的单项选择题。先逐步推理，最后单独写一行“答案：X”，其中 X 是 {letters} 中的一个字母。"
    "\n\n{question}\n\n{options}"
)

DROP = (
    "Read the passage and answer the question about it. Reason step by step, then end with a line of its own, "
    "`Answer: ...`, with nothing but the answer: a number, a date, or words of the passage. Where the answer has "
    "several parts, put ` | ` between them.\n\nPassage: {passage}\n\nQuestion: {question}"
)

FACTS = "{question}\n\nThink about what you know, then end with a line of its own, `Answer: ...`."

HUMANEVAL = (
    "Complete this Python function. Reply with the whole function, imports included, in one block that begins with "
    "```python.\n\n```python\n{question}\n```"
)

CONTEST = (
    "Write a Python program that solves this problem. It must pass all of the hidden tests.\n\n{title}\n\n"
    "{question}\n\n{how}\n\nReply with the whole program in one block that begins with ```python."
)

CODEFORCES = (
    "Write a Python program that solves this contest problem within its limits: {seconds} s and {megabytes} MB a test. "
    "It reads standard input and writes standard output.\n\n{title}\n\n{question}\n\n"
    "Reply with the whole program in one block that begins with ```python."
)
