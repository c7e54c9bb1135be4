//! The table `settings` of the plugin's TOML file. Unknown members are refused: a misspelt one
//! would otherwise mean that nothing happens, at the worst moment.

use fermata_plugin_api::Failure;
use serde::Deserialize;
use serde_json::{Value, json};

/// What the plugin is to do.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Patterns of the events that `notify` is run for.
    #[serde(default = "all")]
    pub events: Vec<String>,
    /// Program and arguments for an event.
    pub notify: Option<Vec<String>>,
    /// Program and arguments that write artifacts.
    pub checkpoint: Option<Vec<String>>,
    /// Program and arguments that bring artifacts back.
    pub restore: Option<Vec<String>>,
    /// How long a program may run.
    #[serde(default = "twenty_seconds")]
    pub timeout_ms: u64,
}

fn all() -> Vec<String> {
    vec!["*".to_owned()]
}

fn twenty_seconds() -> u64 {
    20_000
}

impl Settings {
    /// Checks the settings; an empty command line or an empty program name is refused.
    pub fn parse(settings: Value) -> Result<Self, Failure> {
        let bad = |message: String| Failure::new("bad_settings", message);
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
            return Err(bad("`timeout_ms` must be more than 0".to_owned()));
        }
        Ok(settings)
    }

    /// The JSON schema of the settings.
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
            let failure = Settings::parse(bad.clone()).unwrap_err();
            assert_eq!(failure.code, "bad_settings", "{bad}");
        }
        let settings = Settings::parse(json!({"notify": ["true"]})).unwrap();
        assert_eq!(settings.events, ["*"]);
        assert_eq!(settings.timeout_ms, 20_000);
    }

    #[test]
    fn the_schema_knows_every_setting() {
        let schema = Settings::schema();
        let known = schema["properties"].as_object().unwrap();
        let error = Settings::parse(json!({"?": 1})).unwrap_err().message;
        for name in known.keys() {
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
        assert_eq!(known.len(), 5);
    }
}
