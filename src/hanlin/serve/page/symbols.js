// What LaTeX's commands stand for.

const table = (text) => Object.fromEntries(text.trim().split(/\s+/).map((pair) => pair.split("=")));

/** Letters: shown as identifiers. */
export const LETTERS = table(`
alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ vartheta=ϑ iota=ι kappa=κ lambda=λ mu=μ nu=ν xi=ξ
omicron=ο pi=π varpi=ϖ rho=ρ varrho=ϱ sigma=σ varsigma=ς tau=τ upsilon=υ phi=ϕ varphi=φ chi=χ psi=ψ omega=ω
ell=ℓ hbar=ℏ imath=ı jmath=ȷ aleph=ℵ`);

/** Upright ones. */
export const UPRIGHT = table(`
Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π Sigma=Σ Upsilon=Υ Phi=Φ Psi=Ψ Omega=Ω infty=∞ emptyset=∅ varnothing=∅ Re=ℜ Im=ℑ wp=℘
partial=∂ nabla=∇ top=⊤ bot=⊥ angle=∠ triangle=△ square=□ blacksquare=■ checkmark=✓ dagger=† ddagger=‡ S=§ P=¶ pounds=£
$=$ %=% #=# &=& _=_ ldots=… dots=… cdots=⋯ dotsc=… dotsb=⋯ vdots=⋮ ddots=⋱ prime=′ degree=° clubsuit=♣ heartsuit=♥`);

/** Operators and relations. */
export const OPERATORS = table(`
times=× div=÷ cdot=⋅ pm=± mp=∓ ast=∗ star=⋆ circ=∘ bullet=∙ oplus=⊕ ominus=⊖ otimes=⊗ odot=⊙ wedge=∧ land=∧ vee=∨ lor=∨ cap=∩ cup=∪
setminus=∖ lnot=¬ neg=¬ le=≤ leq=≤ leqslant=⩽ ge=≥ geq=≥ geqslant=⩾ ne=≠ neq=≠ equiv=≡ approx=≈ sim=∼ simeq=≃ cong=≅ propto=∝ ll=≪ gg=≫
prec=≺ succ=≻ in=∈ notin=∉ ni=∋ subset=⊂ subseteq=⊆ subsetneq=⊊ supset=⊃ supseteq=⊇ perp=⊥ parallel=∥ mid=∣ nmid=∤ models=⊨ vdash=⊢
forall=∀ exists=∃ nexists=∄ therefore=∴ because=∵ colon=: coloneqq=≔ doteq=≐ asymp=≍ bowtie=⋈ amalg=⨿
to=→ rightarrow=→ leftarrow=← gets=← leftrightarrow=↔ Rightarrow=⇒ Leftarrow=⇐ Leftrightarrow=⇔ implies=⟹ impliedby=⟸ iff=⟺
mapsto=↦ longmapsto=⟼ longrightarrow=⟶ longleftarrow=⟵ Longrightarrow=⟹ Longleftarrow=⟸ uparrow=↑ downarrow=↓ Uparrow=⇑ Downarrow=⇓
hookrightarrow=↪ rightharpoonup=⇀ rightleftharpoons=⇌ nearrow=↗ searrow=↘ swarrow=↙ nwarrow=↖ upharpoonright=↾ restriction=↾`);

/** Brackets. */
export const FENCES = table(`
{={ }=} lbrace={ rbrace=} lbrack=[ rbrack=] langle=⟨ rangle=⟩ lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ |=‖ Vert=‖ lVert=‖ rVert=‖ vert=|
lvert=| rvert=| backslash=\\ lgroup=⟮ rgroup=⟯`);

/** Large operators; those with limits set them above and below in displayed maths. */
export const LARGE = table(`
sum=∑ prod=∏ coprod=∐ bigcup=⋃ bigcap=⋂ bigoplus=⨁ bigotimes=⨂ bigvee=⋁ bigwedge=⋀ bigsqcup=⨆ int=∫ iint=∬ iiint=∭ oint=∮`);

/** Functions written upright; `LIMITS` of them take what is below underneath. */
export const FUNCTIONS = new Set(
  `sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan exp log ln lg lim limsup liminf max min sup inf arg argmax argmin
det dim ker deg gcd lcm hom Pr tr rank sgn diag softmax`.split(/\s+/),
);
export const LIMITS = new Set("lim limsup liminf max min sup inf det gcd Pr argmax argmin".split(" "));

/** Signs set over (or under) a term. */
export const ACCENTS = table(`
hat=^ widehat=^ bar=¯ overline=¯ vec=→ overrightarrow=→ overleftarrow=← dot=˙ ddot=¨ dddot=⃛ tilde=~ widetilde=~ check=ˇ breve=˘ acute=´ grave=\`
mathring=˚ overbrace=⏞`);
export const UNDER = table("underline=_ underbrace=⏟ underrightarrow=→");
export const STRETCHY = new Set("widehat overline overrightarrow overleftarrow widetilde overbrace underline underbrace underrightarrow".split(" "));

/** Widths of spaces, in em. */
export const SPACES = { ",": "0.167em", ":": "0.222em", ">": "0.222em", ";": "0.278em", "!": "-0.167em", " ": "0.25em", quad: "1em", qquad: "2em", enspace: "0.5em", thinspace: "0.167em" };

const ALPHABETS = {
  bold: [0x1d400, 0x1d41a, 0x1d7ce],
  "bold-italic": [0x1d468, 0x1d482, 0x1d7ce],
  double: [0x1d538, 0x1d552, 0x1d7d8],
  script: [0x1d49c, 0x1d4b6, null],
  fraktur: [0x1d504, 0x1d51e, null],
  sans: [0x1d5a0, 0x1d5ba, 0x1d7e2],
  mono: [0x1d670, 0x1d68a, 0x1d7f6],
};
// Some letters had places of their own before the alphabets came.
const EARLIER = {
  double: { C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" },
  script: { B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" },
  fraktur: { C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" },
};

/** Text in one of Unicode's mathematical alphabets; what an alphabet lacks stays as it is. */
export function styled(text, style) {
  if (!Object.hasOwn(ALPHABETS, style)) return text;
  const [upper, lower, digit] = ALPHABETS[style];
  return Array.from(text, (char) => {
    const early = EARLIER[style]?.[char];
    const code = char.charCodeAt(0);
    if (early) return early;
    if (/^[A-Z]$/.test(char)) return String.fromCodePoint(upper + code - 65);
    if (/^[a-z]$/.test(char)) return String.fromCodePoint(lower + code - 97);
    if (/^[0-9]$/.test(char) && digit) return String.fromCodePoint(digit + code - 48);
    const greek = style.startsWith("bold") ? GREEK.indexOf(char) : -1;
    return greek >= 0 ? String.fromCodePoint((style === "bold" ? 0x1d6a8 : 0x1d71c) + greek) : char;
  }).join("");
}
const GREEK = [..."ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡϴΣΤΥΦΧΨΩ∇αβγδεζηθικλμνξοπρςστυφχψω∂ϵϑϰϕϱϖ"];
