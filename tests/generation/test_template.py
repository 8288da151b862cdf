"""Chat templates: the text that transformers makes, and an end to those that would never end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from colrow.cli import main
from colrow.generation.template import TemplateRenderer
from colrow.generation.tokenizer import load_tokenizer, render_chat
from tests.generation import models

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. <b> & 'quoted' \"text\" é \u2028 {{ 1 }}"},
    {"role": "user", "content": "  What is\n\n1 + 1?  "},
    {"role": "assistant", "content": "<think>hm</think>2"},
    {"role": "user", "content": "{% raw %}"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers & more",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
LLAMA = """{{- bos_token }}
{%- set found = namespace(system='', first=true) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set found.system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" + "Today: " + strftime_now("%d %b %Y") + "\\n" + found.system }}
{% for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<eot>' }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
        {{- tool | tojson(indent=2) }}
        {{- tool.function.parameters | tojson(separators=(',', ':'), sort_keys=true) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "assistant" and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- generation %}{{- content }}{%- endgeneration %}
    {%- elif loop.index > 3 %}{%- break %}
    {%- elif message.role == 'system' %}{%- continue %}
    {%- else %}{{- '<|im_start|>' ~ index ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages if message['role'] != 'system' %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
  [INST] {{ message['content'] | replace("\\n", " ") | upper }} [/INST]
    {% else %}
{{ message['content'] | indent(2) }}{{ eos_token if eos_token is defined else '' }}
    {% endif %}
{% endfor %}
{% macro twice(x, n=2) -%}{{ x * n }}{%- endmacro %}{{ twice('ab') }}{{ dict(a=1).items() | list }}
{{ [3, 1] | sort | join(', ') }} {{ "%05.1f" | format(2.25) }}
{{ messages | map(attribute='role') | list }}{{ messages[0].get('x', 'none') }}{{ nothing }}
{{ {'é': none, 'n': 1.5} | tojson(ensure_ascii=true) }}
"""


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    made = TemplateRenderer()
    yield made
    made.close()


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("template", [LLAMA, QWEN, MISTRAL, models.CHAT_TEMPLATE], ids=len)
def test_the_text_is_that_of_transformers(
    renderer: TemplateRenderer, template: str, tools: Any
) -> None:
    variables = {"bos_token": "<s>", "add_generation_prompt": True}
    expected = render_jinja_template([MESSAGES], tools, None, template, **variables)[0][0]
    given = {"messages": MESSAGES, "tools": tools, "documents": None, **variables}
    assert renderer.render(template, given) == expected
    assert len(expected) > 50


def test_the_tokens_are_those_of_transformers(smollm2: Path, tmp_path: Path) -> None:
    models.save_byte_tokenizer(tmp_path)
    for path in (smollm2, tmp_path):
        tokenizer: Any = load_tokenizer(path)
        for messages in (MESSAGES[:2], MESSAGES[1:2]):
            text = render_chat(tokenizer, messages)
            options = {"add_generation_prompt": True, "return_dict": False}
            assert text == tokenizer.apply_chat_template(messages, tokenize=False, **options)
            assert tokenizer(text, add_special_tokens=False).input_ids == (
                tokenizer.apply_chat_template(messages, **options)
            )


BOMBS = [
    ("{{ 10**(10**7) }}", "computes for more than 1 s"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "computes"),
    ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "writes more than"),
    ("{{ 'x' * 10**7 }}", "writes more than"),
    ("{{ ('x' * 10**7)|length }}{% for i in range(10**9) %}x{% endfor %}", "too large"),
    ("{{ 'a' * 10**9 }}", "too much memory"),
    ("{{ [0] * 10**9 }}", "too much memory"),
    ("{{ '%1000000000d' % 1 }}", "too much memory"),
    ("{{ '%1000000000d'|format(1) }}", "too much memory"),
    ("{{ '{:>1000000000}'.format(1) }}", "too much memory"),
    ("{{ 'x'.rjust(10**9) }}{{ 'x'|center(10**9) }}", "too much memory"),
    ("{{ messages|tojson(indent=10**9) }}", "too much memory"),
    ("{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}", "too much memory"),
    (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}",
        "too much memory",
    ),
    ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls or nests itself too deeply"),
    ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "too deeply"),
    ("{{ " + "(" * 99_999 + "1" + ")" * 99_999 + " }}", "too deeply"),
    ("{% if 1 %}" * 5_000 + "{% endif %}" * 5_000, "too deeply"),
    ("{{ range(10**30) }}", "too large"),
    ("x" * (1 << 20) + "x", "has 1048577 characters"),
    ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ("{{ 'a\\ud800' }}", "UnicodeEncodeError"),
    ("{% include '/etc/passwd' %}", "no loader"),
]


@pytest.mark.parametrize(("template", "message"), BOMBS, ids=[bomb[:30] for bomb, _ in BOMBS])
def test_a_template_that_takes_too_much(
    renderer: TemplateRenderer, template: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"chat template cannot be used: .*{message}") as caught:
        renderer.render(template, {"messages": MESSAGES})
    assert len(str(caught.value)) < 700
    assert renderer.render("{{ messages[1].role }}", {"messages": MESSAGES}) == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n.__init__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ dict.__class__.mro() }}",
        "{{ raise_exception.__globals__.sys.exit() }}",
        "{{ strftime_now.__globals__.os.getcwd() }}",
        "{{ self.__init__.__globals__.environment }}",
        "{{ ('{0.__class__.__init__.__globals__}').format(cycler) }}",
        "{{ (messages|map(attribute='__class__')|list)[0].mro() }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_stays_in_its_sandbox(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(ValueError, match=r"chat template (refuses the messages|cannot be used): "):
        renderer.render(template, {"messages": MESSAGES})


def test_what_the_process_may_do(renderer: TemplateRenderer) -> None:
    renderer.render("x", {})
    child = renderer._child
    assert child is not None
    limits = Path(f"/proc/{child.pid}/limits").read_text().splitlines()
    for name, most in (("Max file size", 0), ("Max processes", 0), ("Max address space", 2**28)):
        line = next(line for line in limits if line.startswith(name))
        assert int(line[len("Max address space ") :].split()[0]) <= most, line
    assert "HOME" not in Path(f"/proc/{child.pid}/environ").read_text()
    assert Path(f"/proc/{child.pid}/cwd").readlink() == Path("/")


def test_rendering_in_threads_and_after_the_process_died(renderer: TemplateRenderer) -> None:
    found: list[str] = []

    def work(index: int) -> None:
        found.append(renderer.render("{{ i }}" + "x" * 200_000, {"i": index})[:1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["0", "1", "2", "3"]
    assert renderer._child is not None
    renderer._child.kill()
    renderer._child.wait()
    assert renderer.render("y", {}) == "y"


def test_the_command_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.save_chat_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 10**(10**7) }}")
    assert main(["generate", str(tmp_path), "hi"]) == 2
    error = capsys.readouterr().err
    assert "the model's chat template cannot be used: it computes for more than 1 s" in error
    assert len(error.strip().splitlines()) == 1
