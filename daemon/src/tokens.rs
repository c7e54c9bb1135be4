//! Counts tokens with an embedded vocabulary (o200k_base), without any network.
//!
//! The vocabulary needs some 30 MB: it is loaded at the first use and dropped after a minute without use.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tiktoken_rs::CoreBPE;

/// How long the vocabulary stays loaded without use.
const KEPT: Duration = Duration::from_secs(60);

/// The size of the pieces that a text is counted in, in bytes: the tokenizer's time grows faster than linearly in a text
/// without spaces.
const PIECE: usize = 4096;

#[derive(Default)]
pub struct TokenCounter {
    loaded: Mutex<Option<Loaded>>,
}

struct Loaded {
    vocabulary: Arc<CoreBPE>,
    used: Instant,
}

impl TokenCounter {
    /// Counts the tokens of a text. Blocking.
    ///
    /// If the embedded vocabulary cannot be loaded, the result is a quarter of the bytes: a token of English text or code
    /// has about four.
    pub fn count(&self, text: &str) -> u64 {
        let Some(vocabulary) = self.vocabulary() else { return (text.len() as u64).div_ceil(4) };
        pieces(text).map(|piece| vocabulary.encode_ordinary(piece).len() as u64).sum()
    }

    fn vocabulary(&self) -> Option<Arc<CoreBPE>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = &mut *loaded {
            loaded.used = Instant::now();
            return Some(Arc::clone(&loaded.vocabulary));
        }
        match tiktoken_rs::o200k_base() {
            Ok(vocabulary) => {
                let vocabulary = Arc::new(vocabulary);
                *loaded = Some(Loaded { vocabulary: Arc::clone(&vocabulary), used: Instant::now() });
                Some(vocabulary)
            }
            Err(error) => {
                tracing::error!(%error, "failed to load the embedded vocabulary; tokens are estimated");
                None
            }
        }
    }

    /// Drops the vocabulary if it was not used for a minute. To be called periodically.
    pub fn drop_if_idle(&self) {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.as_ref().is_some_and(|loaded| loaded.used.elapsed() >= KEPT) {
            *loaded = None;
        }
    }
}

/// Cuts a text at white space, or at a character boundary if a piece has none.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        if rest.len() <= PIECE {
            return Some(std::mem::take(&mut rest));
        }
        let limit = rest.floor_char_boundary(PIECE);
        let cut = rest[..limit].rfind(char::is_whitespace).filter(|&at| at > 0).unwrap_or(limit);
        let (piece, after) = rest.split_at(cut);
        rest = after;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_the_counts_of_the_vocabulary() {
        let counter = TokenCounter::default();
        assert_eq!(counter.count(""), 0);
        assert_eq!(counter.count("hello world"), 2);
        assert_eq!(counter.count("fn main() { println!(\"hi\"); }"), 9);
    }

    #[test]
    fn a_long_text_without_spaces_is_counted_in_bounded_time() {
        let counter = TokenCounter::default();
        let text = "ä".repeat(256 << 10);
        let count = counter.count(&text);
        assert!(count > 0 && count <= text.len() as u64, "{count}");
    }

    #[test]
    fn pieces_lose_nothing() {
        let text = "word ".repeat(5000) + &"x".repeat(10_000);
        assert_eq!(pieces(&text).collect::<String>(), text);
    }
}
