//! Which of the caller's environment variables an agent inherits.

use std::collections::BTreeMap;
use std::ffi::OsString;

use crate::output::note;

/// Variables that identify an agent to the daemon. Neither an agent nor a daemon inherits them.
pub const IDENTITY: [&str; 6] =
    ["FERMATA_TOKEN", "FERMATA_PROJECT", "FERMATA_AGENT", "FERMATA_RESUME", "FERMATA_CONTEXT", "FERMATA_CHECKPOINT"];

/// Selects the variables that an agent inherits: those that are valid UTF-8 and not in [`IDENTITY`]. Writes a warning
/// for each variable that is not UTF-8.
pub fn inherited(variables: impl Iterator<Item = (OsString, OsString)>) -> BTreeMap<String, String> {
    let mut kept = BTreeMap::new();
    for (name, value) in variables {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => {
                if !IDENTITY.contains(&name.as_str()) {
                    kept.insert(name, value);
                }
            }
            (Ok(name), Err(_)) => note(&format!("warning: the variable {name} is not valid UTF-8 and is left out")),
            (Err(name), _) => {
                note(&format!("warning: the variable {} is not valid UTF-8 and is left out", name.to_string_lossy()))
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt as _;

    #[test]
    fn an_agents_identity_is_not_inherited() {
        let variables = [
            ("PATH".into(), "/bin".into()),
            ("FERMATA_TOKEN".into(), "secret".into()),
            ("BAD".into(), OsString::from_vec(vec![0xff])),
        ];
        let kept = inherited(variables.into_iter());
        assert_eq!(kept.into_iter().collect::<Vec<_>>(), [("PATH".into(), "/bin".into())]);
    }
}
