//! Strings of the operating system in JSON: arguments, environment and paths need not be UTF-8.
//!
//! UTF-8 is written as a string, everything else as `{"hex":"…"}`; both are read back byte by byte.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A string of the operating system, serialised without loss.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RawString(OsString);

impl RawString {
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl AsRef<OsStr> for RawString {
    fn as_ref(&self) -> &OsStr {
        &self.0
    }
}

impl<T: Into<OsString>> From<T> for RawString {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Text(String),
    Bytes { hex: String },
}

impl Serialize for RawString {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => {
                let hex = self.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
                Form::Bytes { hex }.serialize(serializer)
            }
        }
    }
}

impl<'de> Deserialize<'de> for RawString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Form::deserialize(deserializer)? {
            Form::Text(text) => Ok(Self(text.into())),
            Form::Bytes { hex } => {
                let digits = hex.as_bytes();
                let byte = |pair: &[u8]| match pair {
                    [high, low] => {
                        let digit = |d: &u8| (*d as char).to_digit(16);
                        u8::try_from(digit(high)? * 16 + digit(low)?).ok()
                    }
                    _ => None,
                };
                let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
                let bytes = bytes
                    .ok_or_else(|| de::Error::custom("an odd number of digits, or an invalid hexadecimal digit"))?;
                Ok(Self(OsString::from_vec(bytes)))
            }
        }
    }
}

/// Serialises a `PathBuf` in the form of [`RawString`], for `#[serde(with)]`.
pub mod path {
    use super::RawString;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::path::{Path, PathBuf};

    pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        RawString::from(path).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        RawString::deserialize(deserializer).map(|raw| PathBuf::from(raw.0))
    }
}

/// Serialises an `Option<PathBuf>` in the form of [`RawString`], for `#[serde(with)]`.
pub mod optional_path {
    use super::RawString;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::path::PathBuf;

    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        path.as_deref().map(RawString::from).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<RawString>::deserialize(deserializer)?.map(|raw| PathBuf::from(raw.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn any_bytes_come_back(bytes: Vec<u8>) {
            let raw = RawString(OsString::from_vec(bytes));
            let text = serde_json::to_string(&raw).unwrap();
            assert_eq!(serde_json::from_str::<RawString>(&text).unwrap(), raw);
        }
    }

    #[test]
    fn broken_hex_is_an_error() {
        for text in [r#"{"hex":"abc"}"#, r#"{"hex":"zz"}"#, "7"] {
            assert!(serde_json::from_str::<RawString>(text).is_err(), "{text}");
        }
    }
}
