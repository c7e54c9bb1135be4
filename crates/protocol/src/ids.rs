//! Identifiers: newtypes that only their own check can make.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

/// The longest name of a project or an agent, in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// Says why a string is not a valid name or id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidId {
    /// The name is empty.
    #[error("a {what} name is empty")]
    Empty {
        /// What the name was for.
        what: &'static str,
    },
    /// The name is longer than [`MAX_NAME_BYTES`].
    #[error("the {what} name '{name}' is longer than {MAX_NAME_BYTES} characters")]
    TooLong {
        /// What the name was for.
        what: &'static str,
        /// The beginning of the offending name.
        name: String,
    },
    /// The name has a character outside the allowed set.
    #[error(
        "the {what} name '{name}' may hold only letters, digits, '.', '_' and '-', and begins with a letter or digit"
    )]
    BadCharacter {
        /// What the name was for.
        what: &'static str,
        /// The offending name.
        name: String,
    },
    /// The id does not have its fixed form.
    #[error("'{id}' is not a valid {what} id")]
    BadForm {
        /// What the id was for.
        what: &'static str,
        /// The offending id.
        id: String,
    },
}

fn check_name(what: &'static str, name: &str) -> Result<(), InvalidId> {
    let shown = || name.chars().take(80).collect::<String>();
    let Some(first) = name.chars().next() else {
        return Err(InvalidId::Empty { what });
    };
    if name.len() > MAX_NAME_BYTES {
        return Err(InvalidId::TooLong { what, name: shown() });
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !first.is_ascii_alphanumeric() || !name.chars().all(allowed) {
        return Err(InvalidId::BadCharacter { what, name: shown() });
    }
    Ok(())
}

fn check_operation(what: &'static str, id: &str) -> Result<(), InvalidId> {
    let good = id.len() <= 40
        && id.split_once('-').is_some_and(|(prefix, rest)| {
            !prefix.is_empty()
                && prefix.bytes().all(|b| b.is_ascii_lowercase())
                && !rest.is_empty()
                && rest.bytes().all(|b| b.is_ascii_hexdigit())
        });
    if good { Ok(()) } else { Err(InvalidId::BadForm { what, id: id.chars().take(80).collect() }) }
}

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident, $pattern:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Checks a string and makes it an id.
            ///
            /// # Errors
            /// Says what is wrong with the string.
            pub fn new(name: impl Into<String>) -> Result<Self, InvalidId> {
                let name = name.into();
                $check($what, &name)?;
                Ok(Self(name))
            }

            /// Returns the id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(s: &str) -> Result<Self, InvalidId> {
                Self::new(s)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(d)?).map_err(serde::de::Error::custom)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    };
}

string_id!(ProjectName, "project", check_name, "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$");
string_id!(
    /// The name of an agent inside its project.
    AgentName, "agent", check_name, "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
);
string_id!(
    /// The id of an operation, `op-` and hexadecimal digits; later ones sort after earlier ones.
    OperationId, "operation", check_operation, "^[a-z]+-[0-9a-fA-F]+$"
);
string_id!(
    /// The id of one run of an agent, `run-` and hexadecimal digits.
    RunId, "run", check_operation, "^[a-z]+-[0-9a-fA-F]+$"
);

/// The number of a checkpoint inside its project, counted from 1 and never used twice.
pub type CheckpointNumber = u64;

/// A point in time: milliseconds since the Unix epoch, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// Returns the milliseconds from `earlier` to `self`, zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> i64 {
        (self.0 - earlier.0).max(0)
    }

    /// Returns the time `ms` milliseconds later.
    pub fn plus(self, ms: i64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

/// What a command is aimed at: a whole project, or one of its agents (`project/agent`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    pub project: ProjectName,
    /// The agent, or every agent of the project.
    pub agent: Option<AgentName>,
}

impl Target {
    /// Makes the target of one agent.
    pub fn agent(project: ProjectName, agent: AgentName) -> Self {
        Self { project, agent: Some(agent) }
    }

    /// Makes the target of a whole project.
    pub fn project(project: ProjectName) -> Self {
        Self { project, agent: None }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.agent {
            Some(agent) => write!(f, "{}/{agent}", self.project),
            None => write!(f, "{}", self.project),
        }
    }
}

impl FromStr for Target {
    type Err = InvalidId;
    fn from_str(s: &str) -> Result<Self, InvalidId> {
        match s.split_once('/') {
            None => Ok(Self::project(ProjectName::new(s)?)),
            Some((project, agent)) => Ok(Self::agent(ProjectName::new(project)?, AgentName::new(agent)?)),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Target {
    fn schema_name() -> Cow<'static, str> {
        "Target".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "`project` or `project/agent`" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_say_what_is_wrong() {
        assert!(ProjectName::new("web-2.x_y").is_ok());
        for bad in ["", "-web", "a/b", "a b", "ü", &"x".repeat(65)] {
            let error = ProjectName::new(bad).expect_err(bad).to_string();
            assert!(error.contains("project"), "{error}");
        }
    }

    #[test]
    fn targets_round_trip() {
        for text in ["web", "web/coder"] {
            assert_eq!(text.parse::<Target>().map(|t| t.to_string()).as_deref(), Ok(text));
        }
        assert!("web/".parse::<Target>().is_err());
        assert!("web/a/b".parse::<Target>().is_err());
    }
}
