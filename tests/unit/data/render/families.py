"""Chat templates in the forms that those of model families have: how turns open and end, and what is made of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A chat template with the added tokens of its tokenizer; of those in `rstrip`, white space behind is a part."""

    form: str  # as in docs/templates.md
    template: str
    tokens: tuple[str, ...]
    eos: str
    rstrip: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        """A tokenizer of single bytes and the added tokens."""
        vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=self.eos)
        for token in (*self.tokens, self.eos):
            added = AddedToken(token, special=True, normalized=False, rstrip=token in self.rstrip)
            tokenizer.add_tokens([added])
        tokenizer.chat_template = self.template
        return tokenizer


IM = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
TOOL_LIST = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"


def _turns(answer: str, prompt: str = PROMPT, tools: str = TOOL_LIST, head: str = "") -> str:
    """A template of `<|im_start|>` turns with this rendering of what is behind an answer's header."""
    return (
        f"{head}{{% if tools %}}<|im_start|>system\n{tools}<|im_end|>\n{{% endif %}}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{% if m.role == 'assistant' %}}{answer}{{% else %}}{{{{ m.content }}}}<|im_end|>\n{{% endif %}}"
        f"{{% endfor %}}{prompt}"
    )


LAST_USER = (
    "{% set ns = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
SPLIT = (
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
BLOCK = "<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
CHAT = "{{ m.content }}"
MARK, UNMARK = "{% generation %}", "{% endgeneration %}"
END = "<|im_end|>{{ '\\n' }}"

FAMILIES = {
    "chatml": Family("`<|im_start|>` turns, tool calls in JSON", _turns(f"{CHAT}{CALLS}{END}"), IM, "<|im_end|>"),
    "reasoning": Family("reasoning in every turn", _turns(f"{THOUGHT}{CHAT}{CALLS}{END}"), IM, "<|im_end|>"),
    "last_thought": Family(
        "reasoning behind the last user message alone, there also an empty block (Qwen3)",
        _turns(
            f"{SPLIT}{{% if loop.index0 > ns.user %}}{BLOCK}{{% endif %}}{{{{ content }}}}{CALLS}{END}", head=LAST_USER
        ),
        IM,
        "<|im_end|>",
    ),
    "open_thought": Family(
        "the same, and the prompt opens the block (Qwen3.5)",
        _turns(
            f"{SPLIT}{{% if loop.index0 > ns.user %}}{BLOCK}{{% endif %}}{{{{ content }}}}{CALLS}{END}",
            PROMPT.replace("assistant\n", "assistant\n<think>\n"),
            head=LAST_USER,
        ),
        IM,
        "<|im_end|>",
    ),
    "switch": Family(
        "the prompt opens a block unless `enable_thinking` is false, plain answers have a closed one (Nemotron 3)",
        _turns(
            "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n"
            f"{{% elif '<think>' not in m.content %}}<think></think>{{% endif %}}{CHAT}{CALLS}{END}",
            PROMPT.replace(
                "assistant\n",
                "assistant\n{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\\n' }}"
                "{% else %}<think></think>{% endif %}",
            ),
        ),
        IM,
        "<|im_end|>",
    ),
    "cut_thought": Family(
        "the prompt opens a block, answers are rendered without it (DeepSeek-R1)",
        _turns(
            "{{ m.content.split('</think>')[-1] }}<|im_end|>\n", PROMPT.replace("assistant\n", "assistant\n<think>\n")
        ),
        IM,
        "<|im_end|>",
    ),
    "closed_prompt": Family(
        "the prompt ends with an empty block unless `enable_thinking` is true, answers are rendered without (Gemma 4)",
        _turns(
            f"{{% if m.reasoning_content and loop.last %}}<think>{{{{ m.reasoning_content }}}}</think>{{% endif %}}"
            f"{CHAT}{CALLS}{END}",
            PROMPT.replace("assistant\n", "assistant\n{% if not enable_thinking %}<think></think>{% endif %}"),
        ),
        IM,
        "<|im_end|>",
    ),
    "closed_answer": Family(
        "answers have an empty block in place of their reasoning, the prompt opens it if `thinking` is true"
        " (DeepSeek-V3.1)",
        _turns(
            f"<think></think>{{{{ m.content.split('</think>')[-1] }}}}{CALLS}{END}",
            PROMPT.replace("assistant\n", "assistant\n<think>{% if not thinking %}</think>{% endif %}"),
        ),
        IM,
        "<|im_end|>",
    ),
    "headers": Family(
        "header tokens, trimmed texts; one call, without text beside it; JSON results (Llama 3.1)",
        "<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        f"{{% if loop.first and tools %}}{TOOL_LIST}{{% endif %}}"
        "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('only one call') }}{% endif %}"
        '{% set f = m.tool_calls[0].function %}{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
        "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
    ),
    "instruct": Family(
        "no generation prompt, tools before the last user message, content or calls (Mistral)",
        f"<s>{LAST_USER}{{% for m in messages %}}{{% if m.role == 'user' %}}"
        "{% if loop.index0 == ns.user and tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
        "[INST] {{ m.content }} [/INST]{% elif m.tool_calls %}[CALLS] [{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}{% elif m.role == 'tool' %}"
        '[RESULT] {"content": {{ m.content | tojson }}} [/RESULT]'
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[CALLS]", "[RESULT]", "[/RESULT]"),
        "</s>",
    ),
    "channels": Family(
        "reasoning, calls and answers in channels, other end tokens in earlier turns; one call (gpt-oss)",
        "{% if tools %}<|start|>developer<|message|>{% for t in tools %}// {{ t.function.description }}\n"
        "type {{ t.function.name }} = (_: {{ '{' }}"
        "{% for k in t.function.parameters.properties %}{{ k }}: any, {% endfor %}}) => any;\n{% endfor %}<|end|>"
        "{% endif %}{% set ns = namespace(call='') %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "{% if m.tool_calls %}{% if m.content %}<|start|>assistant<|channel|>commentary<|message|>{{ m.content }}"
        "<|end|>{% endif %}{% set ns.call = m.tool_calls[0].function.name %}"
        "<|start|>assistant to={{ ns.call }}<|channel|>commentary<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endif %}"
        "{% elif m.role == 'tool' %}<|start|>{{ ns.call }} to=assistant<|channel|>commentary<|message|>"
        "{{ m.content | tojson }}<|end|>"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        "<|return|>",
    ),
    "opened": Family(
        "every rendering ends with the header of the next answer (Command)",
        _turns(f"{CHAT}<|im_end|>\n", "<|im_start|>assistant\n"),
        IM,
        "<|im_end|>",
    ),
    "unended": Family(
        "turns end where the next header starts; a call ends with a closing tag (GLM)",
        "{% if tools %}<|system|>\n{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n"
        "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>"
        "{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|developer|>", *IM[2:]),
        "<|endoftext|>",
    ),
    "declared": Family(
        "tools and sorted arguments without JSON, roles system and user only (Gemma 4)",
        "<s>{% if tools %}<|turn>system\n{% for t in tools %}declaration:{{ t.function.name }}"
        '{description:<|"|>{{ t.function.description }}<|"|>,parameters:{{ "{" }}'
        "{% for k, v in t.function.parameters.properties | dictsort %}{{ k }}:{{ v.type | upper }},{% endfor %}}}"
        "{% endfor %}<turn|>\n{% endif %}{% for m in messages %}"
        "{% if m.role in ['user', 'system', 'assistant', 'tool'] %}"
        "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "{% for c in m.tool_calls or [] %}<|call>call:{{ c.function.name }}{{ '{' }}"
        "{% for k, v in c.function.arguments | dictsort %}{{ k }}:"
        "{% if v is string %}<|\"|>{{ v }}<|\"|>{% elif v is boolean %}{{ 'true' if v else 'false' }}"
        "{% else %}{{ v }}{% endif %},{% endfor %}}<call|>{% endfor %}<turn|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|turn>model\n{% endif %}",
        ("<|turn>", "<turn|>", "<|call>", "<call|>", '<|"|>'),
        "<turn|>",
    ),
    "literal": Family(
        "arguments as a Python literal, escaped JSON of tools",
        _turns(
            f"{CHAT}{{% for c in m.tool_calls or [] %}}{{{{ '\n' + c.function.name }}}}({{{{ c.function.arguments }}}})"
            f"{{% endfor %}}{END}",
            tools="{{ tools | tojson(ensure_ascii=True) }}",
        ),
        IM,
        "<|im_end|>",
    ),
    "text_arguments": Family(
        "arguments have to be text (DeepSeek-V3)",
        _turns(
            f"{CHAT}{{% for c in m.tool_calls or [] %}}{{% set f = c.function %}}<tool_call>"
            f"{{{{ f.name + '\\n' + f.arguments }}}}</tool_call>{{% endfor %}}{END}"
        ),
        IM,
        "<|im_end|>",
    ),
    "marked": Family(
        "`{% generation %}` marks without the end token",
        _turns(f"{MARK}{THOUGHT}{CHAT}{CALLS}{UNMARK}{END}"),
        IM,
        "<|im_end|>",
    ),
    "marked_header": Family(
        "`{% generation %}` marks that include the header",
        _turns(f"{MARK}{THOUGHT}{CHAT}{CALLS}{END}{UNMARK}").replace(
            "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}",
            "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{% endif %}"
            "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n",
        ),
        IM,
        "<|im_end|>",
    ),
    "marked_end": Family(
        "`{% generation %}` marks of the end token alone",
        _turns(f"{CHAT}{MARK}<|im_end|>{UNMARK}{{{{ '\\n' }}}}"),
        IM,
        "<|im_end|>",
    ),
    "swallowed": Family(
        "tokens with `rstrip` (Phi-3)",
        "{% for m in messages %}{% if m.role in ['user', 'system', 'assistant'] %}<|{{ m.role }}|>\n"
        "{{ m.content }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|user|>", "<|system|>", "<|assistant|>"),
        "<|end|>",
        rstrip=("<|user|>", "<|system|>", "<|assistant|>", "<|end|>"),
    ),
    "words": Family(
        "words instead of tokens, the end token of the last turn appended",
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}"
        "{{ 'User: ' if m.role == 'user' else 'Bot: ' }}{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Bot: {% endif %}",
        (),
        "</s>",
    ),
    "parts": Family(
        "content as a list of parts (vision models)",
        _turns("{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n"),
        IM,
        "<|im_end|>",
    ),
}
