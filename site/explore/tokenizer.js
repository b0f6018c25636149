// Text to tokens, as the built-in tokenizer.json says: bytes as letters, words, and merges in their order.

// Words with the space before them, as the tokenizer of GPT-2 divides a text.
const WORDS = new RegExp(
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+/u.source +
  /|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/u.source, "gu");

/** The letter of each byte: itself where it is visible, and otherwise the next free one from U+0100 on. */
function byte_letters() {
  const is_visible = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(is_visible(byte) ? byte : next++));
}

class Tokenizer {
  constructor({ vocab, merges }) {
    this.ids = new Map(vocab.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map(([left, right], rank) => [`${left} ${right}`, rank]));
    this.letters = byte_letters();
    this.vocab = vocab;
  }

  encode(text) {
    return (text.match(WORDS) ?? []).flatMap((word) => {
      const letters = Array.from(new TextEncoder().encode(word), (byte) => this.letters[byte]);
      return this.merge(letters).map((part) => this.ids.get(part));
    });
  }

  /** Join the neighbours whose merge was learned first, until none is left that was. */
  merge(parts) {
    for (;;) {
      const ranks = parts.slice(1).map((right, i) => this.ranks.get(`${parts[i]} ${right}`) ?? Infinity);
      const first = Math.min(...ranks);
      if (first === Infinity) return parts;
      const at = ranks.indexOf(first);
      parts = [...parts.slice(0, at), parts[at] + parts[at + 1], ...parts.slice(at + 2)];
    }
  }

  decode(token) {
    const bytes = Array.from(this.vocab[token], (letter) => this.letters.indexOf(letter));
    return new TextDecoder().decode(Uint8Array.from(bytes));
  }
}
