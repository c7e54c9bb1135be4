//! `[project.config]`: the settings of the project, under the names of the protocol.
//!
//! They are deserialised by serde, so that new settings of the protocol need no change here. A key that ends in `_bytes`
//! also takes a size as a string, one that ends in `_ms` a duration.

use fermata_protocol::project::ProjectConfig;
use serde_json::{Map, Number, Value};

use super::problems::Problem;
use super::section::{Problems, nearest, path};
use super::tree::{TomlEntry, TomlNode, TomlValue};
use crate::units::{millis, parse_bytes, parse_duration};

const PATH: &str = "project.config";

/// Reads the settings; missing ones have their defaults.
pub fn read(member: &TomlEntry, problems: &Problems) -> Option<ProjectConfig> {
    let TomlValue::Table(table) = &member.node.kind else {
        let message = format!("'{PATH}' must be a table, not {}", member.node.kind.name());
        problems.add(Problem::new(member.node.span.clone(), PATH, message));
        return None;
    };
    let mut valid = true;
    // One by one, so that an invalid setting does not hide the next.
    for (name, member) in table {
        let check = |value: Value| config([(name.clone(), value)].into_iter().collect()).map(drop);
        if let Err(why) = check(json(name, &member.node)) {
            valid = false;
            problems.add(locate(path(PATH, name), name, member, &why, &check));
        }
    }
    if !valid {
        return None;
    }
    let all = table.iter().map(|(name, member)| (name.clone(), json(name, &member.node))).collect();
    match config(all) {
        Ok(config) => Some(config),
        Err(why) => {
            problems.add(Problem::new(member.key.clone(), PATH, format!("'{PATH}' is invalid: {why}")));
            None
        }
    }
}

fn config(members: Map<String, Value>) -> Result<ProjectConfig, String> {
    serde_json::from_value(Value::Object(members)).map_err(|e| e.to_string())
}

/// Locates an error of serde: the innermost value without which the error changes.
fn locate(
    path_here: String,
    name: &str,
    member: &TomlEntry,
    why: &str,
    check: &dyn Fn(Value) -> Result<(), String>,
) -> Problem {
    let (unknown, known) = unknown_key(why);
    if let Some(unknown) = unknown {
        if unknown == name {
            return unknown_setting(member, path_here, unknown, &known);
        }
        if let TomlValue::Table(table) = &member.node.kind
            && let Some(inner) = table.get(unknown)
        {
            return unknown_setting(inner, path(&path_here, unknown), unknown, &known);
        }
    }
    match &member.node.kind {
        TomlValue::Table(table) => {
            for (inner_name, inner) in table {
                let with = |value: Option<Value>| {
                    let mut whole = members(table);
                    match value {
                        Some(value) => whole.insert(inner_name.clone(), value),
                        None => whole.remove(inner_name),
                    };
                    check(Value::Object(whole))
                };
                if with(None).err().as_deref() != Some(why) {
                    let check = |value| with(Some(value));
                    return locate(path(&path_here, inner_name), inner_name, inner, why, &check);
                }
            }
        }
        TomlValue::List(items) => {
            let without = |i: usize| {
                let rest = items.iter().enumerate().filter(|(other, _)| *other != i);
                check(Value::Array(rest.map(|(_, item)| json("", item)).collect()))
            };
            let is_cause = |i: &usize| without(*i).err().as_deref() != Some(why);
            if let Some(item) = (0..items.len()).find(is_cause).and_then(|i| items.get(i)) {
                return invalid_value(path_here, "", item, why);
            }
        }
        _ => {}
    }
    invalid_value(path_here, name, &member.node, why)
}

/// Describes the expected type of a value in the terms of the file instead of those of serde.
fn invalid_value(path_here: String, name: &str, node: &TomlNode, why: &str) -> Problem {
    let expected = why.rsplit_once("expected ").filter(|_| why.starts_with("invalid type")).map(|(_, what)| what);
    let wanted = match expected {
        Some(_) if name.ends_with("_bytes") => "a number of bytes, or a size such as \"512M\"",
        Some(_) if name.ends_with("_ms") => "a number of milliseconds, or a duration such as \"90s\"",
        Some("u8" | "u16" | "u32" | "u64" | "usize" | "i32" | "i64") => "an integer",
        Some("f64") => "a number",
        Some("a boolean") => "true or false",
        Some("a string") => "a string",
        Some("a sequence") => "a list",
        _ => {
            let message = if why.starts_with("invalid value: integer") {
                format!("'{path_here}' is out of range")
            } else {
                format!("'{path_here}' is invalid: {why}")
            };
            return Problem::new(node.span.clone(), path_here, message);
        }
    };
    let is = match &node.kind {
        TomlValue::Text(text) => format!("{text:?}"),
        other => other.name().to_owned(),
    };
    let message = format!("'{path_here}' must be {wanted}, not {is}");
    Problem::new(node.span.clone(), path_here, message)
}

fn unknown_setting(member: &TomlEntry, path_here: String, name: &str, known: &[&str]) -> Problem {
    let problem = Problem::new(member.key.clone(), path_here, format!("unknown setting '{name}'"));
    match nearest(name, known) {
        Some(near) => problem.hint(format!("did you mean '{near}'?")),
        None => problem.hint(format!("known settings: {}", known.join(", "))),
    }
}

/// Parses the message of serde about an unknown field: its name, and the known names.
fn unknown_key(why: &str) -> (Option<&str>, Vec<&str>) {
    if !why.starts_with("unknown field") {
        return (None, Vec::new());
    }
    let mut quoted = why.split('`').skip(1).step_by(2);
    (quoted.next(), quoted.collect())
}

fn members(table: &super::tree::TomlTable) -> Map<String, Value> {
    table.iter().map(|(name, member)| (name.clone(), json(name, &member.node))).collect()
}

/// Converts a value to JSON. A string that is not a valid size or duration stays a string, which serde rejects.
fn json(name: &str, node: &TomlNode) -> Value {
    match &node.kind {
        TomlValue::Text(text) => {
            let measured = if name.ends_with("_bytes") {
                parse_bytes(text).ok()
            } else if name.ends_with("_ms") {
                parse_duration(text).ok().map(millis)
            } else {
                None
            };
            measured.map_or_else(|| Value::String(text.clone()), Value::from)
        }
        // An integer that does not fit is out of range for every setting.
        TomlValue::Integer(number) => number.map_or(Value::String("an integer that is too large".into()), Value::from),
        TomlValue::Float(number) => Number::from_f64(*number).map_or(Value::Null, Value::Number),
        TomlValue::Bool(yes) => Value::Bool(*yes),
        TomlValue::Time(time) => Value::String(time.clone()),
        TomlValue::List(items) => Value::Array(items.iter().map(|item| json("", item)).collect()),
        TomlValue::Table(table) => Value::Object(members(table)),
    }
}
