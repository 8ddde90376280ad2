"""The catalogue of diagnostic codes.

1xx syntax, 2xx names and shapes, 3xx algebra, 4xx derivation, 5xx our limits, 6xx run time, 9xx our bug.
"""

from __future__ import annotations

# code -> (title, what the user should know). `psmc explain PSM301` and docs print this table; every
# code has one bad file in tests/bad/ whose rendered text is pinned.
CATALOGUE: dict[str, tuple[str, str]] = {
    "PSM101": ("unexpected text", "The file does not follow the grammar here; the help names the usual cause."),
    "PSM102": ("file cannot be read", "The file is missing, not UTF-8, or holds NUL bytes."),
    "PSM103": (
        "repeated section",
        "An aggregator has at most one lift, combine, recurrence, 'associative' and 'order'.",
    ),
    "PSM104": (
        "word that cannot be a name",
        "Words of the language, Python keywords and a few names that generated code uses are reserved; names are "
        "ASCII letters, digits and underscores.",
    ),
    "PSM105": ("malformed number", "Numbers look like 2, 0.5, .5 or 1e-6. A product needs its '*': 2 * x, not 2x."),
    "PSM106": (
        "malformed interval",
        "An interval is (lo, hi), [lo, hi], (lo, hi] or [lo, hi) over constants, the smaller bound first; an "
        "infinite bound takes a round bracket.",
    ),
    "PSM107": ("malformed tap", "x{-1} is the input x one token earlier; taps reach back at most 64 tokens."),
    "PSM108": (
        "unknown setting",
        "'associative' is yes, assume or no; 'order' is tree or left; a type is real, complex or int.",
    ),
    "PSM109": ("malformed dim size", "A dim may fix its size to a positive whole number: dim R = 2."),
    "PSM110": ("value on an input or param", "Only a state has '= …', which gives its identity element."),
    "PSM111": ("reduction without an index", "A reduction names the index it runs over: sum[i] x[i]."),
    "PSM201": ("unknown name", "A name, dim, component or function that is declared nowhere."),
    "PSM202": (
        "name used twice",
        "Indices, dims, inputs, params, state, consts and lets of an aggregator share one namespace.",
    ),
    "PSM203": (
        "wrong number of subscripts",
        "A tensor takes one subscript per dim it was declared with; a scalar takes none.",
    ),
    "PSM204": (
        "unknown index",
        "An index variable is bound by the left-hand side or by a reduction: a[i] = …, sum[i] …",
    ),
    "PSM205": ("index bound twice", "Within one expression a letter names one index: rename the inner one."),
    "PSM206": ("index over two dims", "An index variable runs over one dim; its uses say which, and they must agree."),
    "PSM207": ("index of unknown dim", "An index takes its dim from the tensors it subscripts."),
    "PSM208": (
        "wrong kind of value",
        "Values are int, real, complex or a condition; operators, subscripts and components take some of these only.",
    ),
    "PSM209": (
        "component read before it is assigned",
        "In a lift or combine a plain component name is the new value. A combine reads the old ones as l.S and r.S.",
    ),
    "PSM210": (
        "value that this block cannot read",
        "A lift reads inputs and params; a combine its two operands and params; a recurrence and an output also "
        "prev.S.",
    ),
    "PSM211": ("component without a value", "Lift, combine and recurrence each assign every component of the state."),
    "PSM212": ("assignment to something else", "Blocks assign components of the state, and lets of their own."),
    "PSM213": (
        "incomplete or contradictory aggregator",
        "An aggregator has a state and either a combine, with or without a lift, or a recurrence.",
    ),
    "PSM214": (
        "missing or contradictory claim",
        "'associative' is yes (it is proved), assume (the author vouches) or no (a fixed order, tree or left, is "
        "meant).",
    ),
    "PSM215": ("cyclic definition", "A let or const may not depend on itself."),
    "PSM216": ("recursive fn", "A fn is expanded in place, so it cannot use itself."),
    "PSM217": (
        "expansion too large",
        "Macros and loops expand to a bounded number of operations, 200 levels deep at most.",
    ),
    "PSM218": (
        "wrong arguments",
        "Functions take a fixed number of arguments; tensors are passed by their bare names.",
    ),
    "PSM220": ("loop that cannot be unrolled", "'for r in R' needs a dim of fixed size, at most 64: dim R = 2."),
    "PSM221": ("misplaced tap", "Taps x{-1} read inputs, 1 to 64 tokens back."),
    "PSM222": ("unusable identity element", "Every component has '= …' over numbers, consts, dims, 'eye' and 'iota'."),
    "PSM223": ("interval of complex values", "Intervals bound real and int values; complex ones have no order."),
    "PSM224": ("file that cannot be used", "'use' reads the fns and consts of another file, without cycles."),
    "PSM225": ("const that is not constant", "A const is made of numbers and other consts."),
    "PSM226": (
        "reserved argument name",
        "Inputs and params may not be called like a keyword of the compiled function.",
    ),
    "PSM227": ("literal subscript out of range", "A literal position needs a dim of fixed size that holds it."),
    "PSM229": ("dim of unknown size", "A dim without a fixed size takes it from an input or a param."),
    "PSM230": (
        "misplaced level",
        "at(c).S, in an output, is what a tree's counter holds at level c, an index over a dim of fixed size.",
    ),
    "PSM250": (
        "shapes that do not fit",
        "In a traced method, shapes broadcast from the right as in numpy, over dim names instead of sizes.",
    ),
    "PSM251": (
        "value of another shape",
        "A method returns each component with the dims it is declared with; a scalar fills them all.",
    ),
    "PSM252": (
        "traced array used as a value",
        "A method runs once, on arrays whose numbers are not known yet: no if, float(), iteration, numpy or torch"
        " call on them.",
    ),
    "PSM253": (
        "wrong result of a method",
        "Methods return a dict of named arrays; 'output' may return one bare array.",
    ),
    "PSM254": ("exception in a traced method", "The method's own Python code raised; the exception is chained."),
    "PSM255": (
        "wrong method",
        "An aggregator class has let(x), lift(x), combine(l, r), recurrence(s, x), output(s, x): no self.",
    ),
    "PSM256": ("array of another method", "A traced method reads its own arguments only."),
    "PSM257": (
        "unusable subscript or axis",
        "Subscripts are ':', None, '...', whole numbers and one int array; axes are whole numbers.",
    ),
    "PSM258": ("wrong argument of the decorator", "Declarations are strings, as a .psm file writes them."),
    "PSM290": ("no such aggregator", "A file may hold several aggregators; name one of them."),
    "PSM291": ("file outside the project", "'use' reads a .psm file in the same directory or below it."),
    "PSM292": ("missing rule", "'combine extern' takes its rule from Python: psmc.load(path, extern=my_combine)."),
    "PSM293": ("rule that is not wanted", "'extern' is for aggregators that say 'combine extern'."),
    "PSM294": ("file that cannot be written", "The place is no directory, is full, or may not be written to."),
    "PSM295": ("file that exists", "psmc new overwrites a file with --force only; psmc compile, a module of its own."),
    "PSM296": ("rule that fails", "What '--extern' names could not be loaded, or raised when it was called."),
    "PSM301": (
        "claim refuted",
        "'associative: yes' and 'assume' are refused where a counterexample exists: (a∘b)∘c and a∘(b∘c) differ there.",
    ),
    "PSM302": ("wrong identity element", "The values behind '=' must change nothing: e∘x = x and x∘e = x."),
    "PSM303": (
        "claim neither proved nor refuted",
        "'associative: yes' is printed only behind a proof. What is left to show is in the note; 'assume' vouches"
        " for it.",
    ),
    "PSM304": ("identity element neither proved nor refuted", "e∘x = x and x∘e = x are proved like the claim itself."),
    "PSM401": (
        "recurrence that cannot be lifted",
        "A recurrence is lifted to a scan if its maps compose to maps of the same form: affine in a semiring, "
        "fractional-linear, with a floor and a ceiling, or of a finite set; docs/language.md lists them.",
    ),
    "PSM402": ("recurrence on several indices", "A transition mixes the entries of a state along one index only."),
    "PSM403": (
        "coefficient that depends on the state",
        "An affine recurrence may read another component only affinely, or as a scale exp(prev.m + f - m).",
    ),
    "PSM404": ("coupled components of different shapes", "Components that depend on each other have the same dims."),
    "PSM501": (
        "source too large",
        "psmc reads files of at most a megabyte, 100,000 words and signs, and 500 aggregators; a spec is some 10 to 20"
        " lines.",
    ),
    "PSM502": (
        "nested too deeply",
        "Brackets and expressions nest at most 200 deep; a chain a + b + … counts each operator.",
    ),
    "PSM503": ("name too long", "Names have at most 64 characters."),
    "PSM504": ("number out of range", "Literals have at most 64 digits and a decimal exponent within ±400."),
    "PSM510": (
        "complex operator without a real form",
        "Fused kernels compute complex values as pairs of reals. Sums, products, quotients, conj, abs, exp, where"
        " and whole powers have such a form; other functions of a complex value do not.",
    ),
    "PSM601": ("wrong arguments of a call", "A compiled aggregator takes inputs, then params, by position or by name."),
    "PSM602": ("tensor that does not fit", "Inputs are [B, T, *lanes, *dims], params [*lanes, *dims] or [*dims]."),
    "PSM603": ("size that is not known", "The size of a dim is taken from the tensors that are passed."),
    "PSM604": ("mask or reset of a wrong shape", "mask and reset are [B, T]."),
    "PSM605": ("state that does not fit", "A state is what init_state, a call or a step returned for such inputs."),
    "PSM606": ("wrong cu_seqlens", "N + 1 token offsets; the sequences are packed in a batch of 1."),
    "PSM607": ("tokens without a product", "Only an associative rule has a product of tokens."),
    "PSM608": ("value that was ruled out", "Values are checked, as agg.checks or PSMC_CHECK=1 asks for."),
    "PSM609": ("more tokens than levels", "at(c).S counts levels over a dim of L: up to 2^L - 1 tokens of a sequence."),
    "PSM620": ("no device to tune on", "psmc tune times kernels: it needs a GPU, torch and triton, or --interpret."),
    "PSM621": ("nothing to tune", "What runs in PyTorch has no kernels, so no tiles to choose."),
    "PSM622": ("malformed tuned file", "What psmc tune writes; each tile has the numbers of its plan."),
    "PSM623": (
        "tuned file for another module",
        "A tuned file is for one module: after a change of the spec or of the compiler, tiles are tuned again.",
    ),
    "PSM624": ("no tile that is right", "Every tile of a kernel is checked before it is timed; here all of them fail."),
    "PSM651": ("attention that cannot be built", "A width divides into heads; positions are 'rotary' or 'learned'."),
    "PSM652": (
        "prefix-scannable model that cannot be built",
        "Chunks have from 1 token on; plans, identities and what is kept are named ones; a call has tokens.",
    ),
    "PSM653": ("generation that cannot start", "A prompt is [B, T] with T from 1 on; temperature is from 0 on."),
    "PSM654": (
        "spec that cannot be a mixer",
        "ScanMixer projects tokens to the real and complex inputs of a compiled aggregator; its dims need sizes.",
    ),
    "PSM690": (
        "arguments do not fit the spec",
        "The reference fold was called with tensors that the spec does not allow.",
    ),
    "PSM900": ("bug of psmc", "Nothing is wrong with the spec or the command: please report it."),
    "PSM901": ("contradiction in the prover", "Two methods disagree, so neither is believed: please report it."),
}
