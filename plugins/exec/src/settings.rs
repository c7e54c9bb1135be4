//! The table `settings` of the configuration of the plugin. Unknown keys are rejected, since a misspelt one would disable
//! a program without notice.

use fermata_plugin_api::CallError;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSettings {
    /// Patterns of the events for which `notify` is run.
    #[serde(default = "all")]
    pub events: Vec<String>,
    /// The program and arguments that handle an event.
    pub notify: Option<Vec<String>>,
    /// The program and arguments that write artifacts.
    pub checkpoint: Option<Vec<String>>,
    /// The program and arguments that restore artifacts.
    pub restore: Option<Vec<String>>,
    /// The time limit of each program in milliseconds.
    #[serde(default = "twenty_seconds")]
    pub timeout_ms: u64,
}

fn all() -> Vec<String> {
    vec!["*".to_owned()]
}

fn twenty_seconds() -> u64 {
    20_000
}

impl ExecSettings {
    /// Parses and checks the settings.
    ///
    /// # Errors
    /// For unknown keys, empty commands, and a time limit of 0.
    pub fn parse(settings: Value) -> Result<Self, CallError> {
        let bad = |message: String| CallError::new("bad_settings", message);
        let settings: Self =
            serde_json::from_value(settings).map_err(|error| bad(format!("the settings are not valid: {error}")))?;
        let programs =
            [("notify", &settings.notify), ("checkpoint", &settings.checkpoint), ("restore", &settings.restore)];
        for (name, argv) in programs {
            if let Some(argv) = argv
                && argv.first().is_none_or(String::is_empty)
            {
                return Err(bad(format!("`{name}` names no program")));
            }
        }
        if settings.timeout_ms == 0 {
            return Err(bad("`timeout_ms` must be greater than 0".to_owned()));
        }
        Ok(settings)
    }

    /// Returns the JSON schema of the settings.
    pub fn schema() -> Value {
        let argv = json!({"type": "array", "items": {"type": "string"}, "minItems": 1});
        json!({
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "events": {"type": "array", "items": {"type": "string"}, "default": ["*"]},
                "notify": argv,
                "checkpoint": argv,
                "restore": argv,
                "timeout_ms": {"type": "integer", "minimum": 1, "default": 20000}
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_would_do_nothing_are_refused() {
        for bad in [
            json!({"notfy": ["true"]}),
            json!({"notify": []}),
            json!({"checkpoint": [""]}),
            json!({"timeout_ms": 0}),
            json!({"notify": "notify-send x"}),
        ] {
            let error = ExecSettings::parse(bad.clone()).unwrap_err();
            assert_eq!(error.code, "bad_settings", "{bad}");
        }
        let settings = ExecSettings::parse(json!({"notify": ["true"]})).unwrap();
        assert_eq!(settings.events, ["*"]);
        assert_eq!(settings.timeout_ms, 20_000);
    }

    #[test]
    fn the_schema_knows_every_setting() {
        let schema = ExecSettings::schema();
        let properties = schema["properties"].as_object().unwrap();
        let error = ExecSettings::parse(json!({"?": 1})).unwrap_err().message;
        for name in properties.keys() {
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
        assert_eq!(properties.len(), 5);
    }
}
