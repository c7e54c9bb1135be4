//! Paths inside a workspace: raw bytes, relative and checked.
//!
//! A [`RelPath`] cannot leave the workspace: it has no empty, `.` or `..` component, no NUL and no leading
//! slash. In messages and JSON, control characters, `%` and bytes that are not UTF-8 are escaped as `%XX`,
//! which loses nothing.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use fermata_protocol::paths::{escape, unescape};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The prefix of a restore's temporary names; the id of its plan and a number follow.
pub const RESTORE_PREFIX: &[u8] = b".fermata-restore-";

/// The number of hexadecimal digits in the id of a plan.
pub(crate) const PLAN_ID_DIGITS: usize = 12;

/// A path relative to the workspace; the empty path is the workspace itself.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelPath(Vec<u8>);

/// A path or name that must not be used inside a workspace, escaped.
#[derive(Debug, thiserror::Error)]
#[error("unsafe path {0:?}")]
pub struct UnsafePath(pub String);

impl RelPath {
    /// Returns the path of the workspace itself.
    pub fn root() -> Self {
        RelPath(Vec::new())
    }

    /// Checks the bytes of a relative path.
    ///
    /// # Errors
    /// Refuses empty, `.` and `..` components, absolute paths and NUL bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, UnsafePath> {
        let bytes = bytes.into();
        let good = |name: &[u8]| !name.is_empty() && name != b"." && name != b".." && !name.contains(&0);
        if bytes.is_empty() || bytes.split(|b| *b == b'/').all(good) {
            Ok(RelPath(bytes))
        } else {
            Err(UnsafePath(escape(&bytes)))
        }
    }

    /// Appends one name, which must come from a directory listing or have passed `is_safe_name`.
    pub fn join(&self, name: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.len());
        bytes.extend_from_slice(&self.0);
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        RelPath(bytes)
    }

    /// Splits off the last name; `None` for the workspace itself.
    pub fn split(&self) -> Option<(RelPath, &[u8])> {
        if self.0.is_empty() {
            return None;
        }
        Some(match self.0.iter().rposition(|b| *b == b'/') {
            Some(slash) => (RelPath(self.0[..slash].to_vec()), &self.0[slash + 1..]),
            None => (RelPath::root(), &self.0[..]),
        })
    }

    /// Returns the directory that holds the path; `None` for the workspace itself.
    pub fn parent(&self) -> Option<RelPath> {
        self.split().map(|(parent, _)| parent)
    }

    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the path relative to the workspace, for system calls.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// Says whether the path is `other` or lies below it.
    pub fn is_within(&self, other: &RelPath) -> bool {
        other.is_root() || (self.0.starts_with(&other.0) && matches!(self.0.get(other.0.len()), None | Some(b'/')))
    }

    /// Returns the number of components.
    pub fn depth(&self) -> usize {
        if self.is_root() { 0 } else { self.0.split(|b| *b == b'/').count() }
    }

    /// Says whether a restore may write every component.
    pub fn is_restorable(&self) -> bool {
        self.is_root() || self.0.split(|b| *b == b'/').all(is_safe_name)
    }
}

/// Says whether a restore may create a name from the store: one component, and not `.git`.
pub fn is_safe_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !is_git(name) && !name.iter().any(|b| matches!(b, 0 | b'/'))
}

/// Says whether a name is that of a restore's temporary file, which is never covered.
pub fn is_staged_name(name: &[u8]) -> bool {
    let Some((id, number)) = name.strip_prefix(RESTORE_PREFIX).and_then(|rest| rest.split_at_checked(PLAN_ID_DIGITS))
    else {
        return false;
    };
    let is_number = |digits: &[u8]| (1..=2).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    is_plan_id(id) && (number.is_empty() || number.strip_prefix(b"-").is_some_and(is_number))
}

pub(crate) fn is_plan_id(id: &[u8]) -> bool {
    id.len() == PLAN_ID_DIGITS && id.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Says whether a name is `.git` in any case: some file systems ignore case.
pub fn is_git(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b".git")
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_root() { "." } else { "" })?;
        f.write_str(&escape(&self.0))
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for RelPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&escape(&self.0))
    }
}

impl<'de> Deserialize<'de> for RelPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let text = String::deserialize(deserializer)?;
        let bytes = unescape(&text).ok_or_else(|| D::Error::custom("a path is not well escaped"))?;
        RelPath::new(bytes).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn escaping_loses_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(unescape(&escape(&bytes)).unwrap(), bytes);
        }
    }

    #[test]
    fn paths_that_leave_the_workspace_are_refused() {
        for bad in ["/etc", "a//b", "../x", "a/..", "a/./b", "a/", "a\0b"] {
            assert!(RelPath::new(bad).is_err(), "{bad:?}");
        }
        assert!(RelPath::new("a/b.c/...").is_ok());
        assert!(!RelPath::new("a/.GIT/hooks").unwrap().is_restorable());
    }

    #[test]
    fn a_sibling_with_the_same_beginning_is_not_within() {
        let dir = RelPath::new("a").unwrap();
        assert!(RelPath::new("a/b").unwrap().is_within(&dir));
        assert!(!RelPath::new("ab").unwrap().is_within(&dir));
    }
}
