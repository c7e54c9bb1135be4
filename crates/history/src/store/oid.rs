//! Git object ids and how they are computed.
//!
//! Ids are computed here with the processor's SHA-1 instructions, since libgit2's implementation is three times
//! slower. This module does not access files.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha1::{Digest, Sha1};

/// The kinds of objects that the store writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    Commit,
    Tree,
    /// The content of a file, the target of a symbolic link, or metadata.
    Blob,
}

impl ObjectKind {
    /// Returns git's word for the kind, which is part of the hashed header.
    pub fn word(self) -> &'static str {
        match self {
            ObjectKind::Commit => "commit",
            ObjectKind::Tree => "tree",
            ObjectKind::Blob => "blob",
        }
    }
}

/// The id of an object: the SHA-1 of its header and content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Oid([u8; 20]);

/// A text that is not 40 hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("not an object id: {0:?}")]
pub struct NotAnOid(pub String);

impl Oid {
    pub fn from_raw(raw: [u8; 20]) -> Self {
        Oid(raw)
    }

    pub fn raw(&self) -> &[u8; 20] {
        &self.0
    }

    /// Computes the id of an object in memory.
    pub fn of(kind: ObjectKind, content: &[u8]) -> Self {
        let mut hasher = ObjectHasher::new(kind, content.len() as u64);
        hasher.update(content);
        hasher.finish()
    }
}

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Oid {
    type Err = NotAnOid;

    fn from_str(text: &str) -> Result<Self, NotAnOid> {
        let refuse = || NotAnOid(text.chars().take(64).collect());
        let bytes = text.as_bytes();
        if bytes.len() != 40 {
            return Err(refuse());
        }
        let mut raw = [0; 20];
        for (byte, pair) in raw.iter_mut().zip(bytes.chunks_exact(2)) {
            let digit = |c: u8| (c as char).to_digit(16).ok_or_else(refuse);
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Ok(Oid(raw))
    }
}

impl Serialize for Oid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Oid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Computes the id of an object whose content comes in pieces; its size must be known at the start.
pub struct ObjectHasher(Sha1);

impl ObjectHasher {
    /// Begins an object of `size` bytes.
    pub fn new(kind: ObjectKind, size: u64) -> Self {
        let mut hasher = Sha1::new();
        hasher.update(format!("{} {size}\0", kind.word()));
        ObjectHasher(hasher)
    }

    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    pub fn finish(self) -> Oid {
        Oid(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_git() {
        let empty = Oid::of(ObjectKind::Blob, b"");
        assert_eq!(empty.to_string(), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        let tree = Oid::of(ObjectKind::Tree, b"");
        assert_eq!(tree.to_string(), "4b825dc642cb6eb9a060e54bf8d69288fbee4904");
        assert_eq!(tree.to_string().parse::<Oid>().unwrap(), tree);
        assert!("4b825dc6".parse::<Oid>().is_err());
    }
}
