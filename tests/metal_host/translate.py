"""From Metal's dialect to C++, and rules of Metal that a C++ compiler doesn't check."""

import re
from itertools import count

from .capture import Capture

THREADGROUP_VARIABLES = re.compile(
    r"\bthreadgroup\s+((?:[A-Za-z_][\w:]*(?:\s*<[^;<>]*>)?\s+)+?)"
    r"([A-Za-z_]\w*\s*(?:\[[^\]]*\]\s*)*(?:,\s*[A-Za-z_]\w*\s*(?:\[[^\]]*\]\s*)*)*);"
)
DECLARATOR = re.compile(r"([A-Za-z_]\w*)\s*((?:\[[^\]]*\]\s*)*)")
VECTOR_CONSTRUCTOR = re.compile(r"\b(?:metal::)?vec\s*<([^<>;(){}]+)>\s*\(")
INSTANTIATION = re.compile(r"template\s*\[\[host_name\([^;]*;", re.DOTALL)
MOST_BUFFERS = 31
FORBIDDEN = [
    (r"\bstd::", "std:: does not exist in Metal"),
    (r"\b(?:try|catch|throw|goto|new|delete|virtual|dynamic_cast|thread_local|asm|typeid)\b", "not in Metal"),
    (r"\b(?:long\s+)?double\b", "no double in Metal"),
    (r"\bprintf\b", "no printf in Metal"),
    (r"#\s*include\s*<(?!metal)", "only Metal's headers can be included"),
    (r"\b(?:__builtin|msl_)\w+|\b(?:_Float16|__bf16|__attribute__)\b", "a name of clang or of the emulator"),
    (
        r"(?<![\w\)\]\[])\[\s*[&=]?[\w\s,&]*\]\s*(?:\([^)]*\))?\s*(?:mutable\s*)?(?:->\s*\w+\s*)?\{",
        "no lambdas in Metal",
    ),
]
BARE_POINTER = re.compile(
    r"(?:^|[;{(,])\s*((?:const\s+|volatile\s+)*(?:float|half|bfloat\w*|u?int|u?char|u?short|bool|u?long|u?int\d+_t"
    r"|(?:float|half|bfloat|u?int)[234]|T)\s*[*&]\s*\w+)",
    re.MULTILINE,
)


def without_comments(source: str) -> str:
    """Comments become blanks, so that lines and columns stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group(0))

    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, source, flags=re.DOTALL)


def broken_rules(kernel: Capture) -> list[str]:
    """Rules of Metal that clang would not see broken, as `file:line: what`."""
    header = kernel.source[: kernel.source.index("[[kernel]]")]
    found = []
    if "[[buffer(" in kernel.body:
        found.append(
            "MLX closed the signature too early; it doesn't when the source mentions a thread attribute"
        )
    if len(kernel.buffers) > MOST_BUFFERS:
        found.append(f"{len(kernel.buffers)} buffers; Metal allows {MOST_BUFFERS}")
    for file, text in (("header.metal", header), ("kernel.metal", kernel.body)):
        text = without_comments(text)
        rules = [(m, why) for rule, why in FORBIDDEN for m in re.finditer(rule, text)]
        rules += [(m, "a pointer or reference without an address space") for m in BARE_POINTER.finditer(text)]
        if file == "header.metal":
            outside = "a threadgroup variable outside the kernel function"
            rules += [(m, outside) for m in THREADGROUP_VARIABLES.finditer(text)]
        for match, why in rules:
            start = match.start(1) if match.re.groups and match.start(1) >= 0 else match.start()
            line = text.count("\n", 0, start) + 1
            found.append(f"{file}:{line}: {why}: {text[start : match.end()].strip()!r}")
    return found


def _constructors(source: str) -> str:
    """`vec<T, 4>(..)` becomes the shim's constructor; float4(..) and the like are macros."""
    return VECTOR_CONSTRUCTOR.sub(r"msl_make<vec<\1>>(", source)


def _threadgroup_variables(source: str, types_only: bool) -> str:
    """`threadgroup T a[N], b;` becomes a declaration each; executed, a reference to shared memory."""
    numbers = count()

    def declare(kind: str, name: str, dimensions: str) -> str:
        if types_only:
            return f"extern threadgroup {kind} {name}{dimensions};"
        alias = f"msl_type_of_{name}"
        sizes = f"sizeof({alias}), sizeof({kind})"
        memory = f'msl_threadgroup_variable({next(numbers)}, {sizes}, "{name}", __LINE__)'
        return f"typedef {kind} {alias}{dimensions}; {alias}& {name} = *({alias}*){memory};"

    def declare_all(match: re.Match[str]) -> str:
        declarators = DECLARATOR.findall(match.group(2))
        return " ".join(declare(match.group(1).strip(), name, where.strip()) for name, where in declarators)

    return THREADGROUP_VARIABLES.sub(declare_all, source)


def _entry_point(kernel: Capture) -> str:
    """Calls the kernel for one thread, with buffers and attributes in the order of its signature."""
    arguments = [f"{'*' if b.reference else ''}({b.type}*)buffers[{i}]" for i, b in enumerate(kernel.buffers)]
    for kind, name in kernel.attributes:
        arguments.append(
            f"msl_triple_as<{kind}>(self->{name})" if kind[-1].isdigit() else f"({kind})self->{name}"
        )
    return (
        'extern "C" MSL_UNTRACED void msl_kernel_entry(void** buffers, const msl_attributes* self) {\n'
        f"  {kernel.instance}({', '.join(arguments)});\n}}\n"
    )


def to_cpp(kernel: Capture, types_only: bool) -> str:
    """The translation unit. With `types_only` the kernel is instantiated but not called."""
    header, body = without_comments(kernel.header), without_comments(kernel.body)
    parts = [
        '#include "mlx_prelude.h"\n#line 1 "header.metal"\n',
        _constructors(header),
        '#line 1 "kernel.metal"\n',
        _threadgroup_variables(_constructors(INSTANTIATION.sub("", body)), types_only),
        '\n#line 1 "entry"\n',
        f"auto msl_instance = &{kernel.instance};\n" if types_only else _entry_point(kernel),
    ]
    return "".join(parts)
